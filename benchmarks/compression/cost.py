"""What a compression costs: time and memory of scoring and reducing a prompt, method by method on the same slots.

    python -m benchmarks.compression.cost [--device cuda] [--lengths 8192 16384] [--out DIRECTORY]

A Llama of random weights with the heads of an 8B model (32 query and 8 KV heads of 128) and a few layers reads random
tokens and compresses them, with every method in turn, several rounds of all. Two times per layer are reported:
``observe``, what the score does during the prefill, and ``compress``. Memory is the largest sum of what is allocated
during the compression and not yet freed, as a share of one layer's keys and values; a layer's result, ``budget`` of
them, is part of it, those of other layers are not. It is counted in a round of its own, which is not timed. What layers
do together, such as sharing one budget, counts for each by its part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import keepkv
from keepkv.engine.layer import Layer
from keepkv.engine.versions import CACHE
from keepkv.measure import environment

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "snapkv": ("snapkv", {}),
    "keydiff": ("keydiff", {}),
    "adakv": ("adakv", {}),
    "expected-attention": ("expected-attention", {}),
    "keepkv": ("keepkv", {}),
    "attention-matching": ("attention-matching", {}),
    "compactor": ("compactor", {}),
    "keepkv2": ("keepkv2", {}),
    "keepkv2:queries=0": ("keepkv2", {"queries": 0}),
    "keepkv2:queries=32": ("keepkv2", {"queries": 32}),
    "keepkv2:allocate=uniform": ("keepkv2", {"allocate": "uniform"}),
    "keepkv2:merge=0.8": ("keepkv2", {"merge": 0.8}),
}


GPU = {"cpu": [], "cuda": [ProfilerActivity.CUDA]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--layers", type=int, default=None, help="8 on a GPU, 2 elsewhere")
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    a = parser.parse_args()
    dtype = getattr(torch, a.dtype or ("bfloat16" if a.device == "cuda" else "float32"))
    a.layers = a.layers or (8 if a.device == "cuda" else 2)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=1024, intermediate_size=1024, num_hidden_layers=a.layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=max(a.lengths) + 8,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(a.device, dtype).eval()
    rows = [row for length in a.lengths for row in measure(model, length, a)]
    a.out.mkdir(parents=True, exist_ok=True)
    name = "gpu" if a.device == "cuda" else "cpu"
    about = {
        "device": device_name(a.device), "dtype": str(dtype), "threads": torch.get_num_threads(), "layers": a.layers,
        "versions": environment.versions(), "budget": a.budget, "rounds": a.rounds,
    }  # fmt: skip
    (a.out / f"{name}.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    text = table(rows, about)
    (a.out / f"{name}.md").write_text(text)
    print(text)


def device_name(device: str) -> str:
    """Of the GPU, or of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "cpu")


@torch.inference_mode()
def measure(model: Any, length: int, a: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per method: medians over rounds in which all methods take turns, after one in which memory is counted;
    of the ratio to snapkv, that of the ratios within a round."""
    ids = torch.randint(256, (1, length), device=a.device)
    memory = {name: once(model, ids, *METHODS[name], a.budget, counted=True)[2] for name in a.methods}
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in a.methods}
    for _ in range(a.rounds):
        for name in a.methods:
            found[name].append(once(model, ids, *METHODS[name], a.budget))
    config = model.config
    content = 2 * config.num_key_value_heads * config.head_dim * length * model.dtype.itemsize
    # Round by round: what else the machine does in a round slows down all of it.
    base = [sum(x[:2]) for x in found["snapkv"]] if "snapkv" in found else None
    rows = []
    for name, ones in found.items():
        observe, compress = (sorted(x[i] / a.layers for x in ones) for i in range(2))
        times = sorted(sum(x[:2]) / y for x, y in zip(ones, base, strict=True)) if base else None
        rows.append({
            "method": name, "length": length, "observe_ms": statistics.median(observe) * 1e3,
            "compress_ms": statistics.median(compress) * 1e3, "compress_low_ms": compress[0] * 1e3,
            "compress_high_ms": compress[-1] * 1e3, "times_snapkv": statistics.median(times) if times else None,
            "times_snapkv_low": times[0] if times else None, "times_snapkv_high": times[-1] if times else None,
            "memory_share": memory[name] / content - (a.layers - 1) * a.budget,
        })  # fmt: skip
    return rows


def once(
    model: Any, ids: torch.Tensor, method: str, options: dict[str, Any], budget: float, counted: bool = False
) -> tuple[float, float, int]:
    """Seconds of observing and of compressing all layers; bytes at the peak of the latter if they are ``counted``."""
    cache = keepkv.Cache(model, method, budget, when=keepkv.When("deferred"), **options)
    spent = [0.0]
    with watched(cache, spent):
        model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    wait(ids)
    watching = profile(activities=[ProfilerActivity.CPU, *GPU[ids.device.type]], profile_memory=True)
    with watching if counted else nullcontext() as seen:
        began = time.perf_counter()
        cache.compress()
        wait(ids)
        seconds = time.perf_counter() - began
    assert cache.report().compressed
    return spent[0], seconds, 0 if seen is None else peak(seen, ids.device.type.upper())


def peak(seen: profile, device: str) -> int:
    """The largest sum of bytes allocated on the device under ``seen`` and not yet freed."""
    found = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    found = sorted((e for e in found if e.device_type().name == device), key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in found), default=0)


@contextmanager
def watched(cache: keepkv.Cache, spent: list[float], clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
    """Adds up the seconds, by ``clock``, that the layers of ``cache`` take to observe."""
    for layer in cache.layers:
        if isinstance(layer, Layer):
            layer._observe = timed(layer._observe, spent, clock)  # type: ignore[method-assign]
    yield


def timed(observe: Any, spent: list[float], clock: Callable[[], float]) -> Any:
    def run(latest: Any, *more: Any) -> None:
        wait(latest.query)
        began = clock()
        observe(latest, *more)
        wait(latest.query)
        spent[0] += clock() - began

    return run


def wait(x: torch.Tensor) -> None:
    """For a GPU to finish."""
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{about['device']}, {about['dtype']}, {about['threads']} threads, budget {about['budget']}; per layer of one "
        f"sequence, medians of {about['rounds']} rounds (lowest to highest).",
        "",
        "| slots | method | observe, ms | compress, ms | both, × snapkv | peak memory, share of the layer |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["times_snapkv_low"], r["times_snapkv_high"]
        times = "" if r["times_snapkv"] is None else f"{r['times_snapkv']:.2f} ({low:.2f}–{high:.2f})"
        lines.append(
            f"| {r['length']:,} | `{r['method']}` | {r['observe_ms']:.2f} | {r['compress_ms']:.2f} "
            f"({r['compress_low_ms']:.2f}–{r['compress_high_ms']:.2f}) | {times} | {r['memory_share']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
