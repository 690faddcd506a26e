"""A whole decoded token beside what was seen: keepkv in full precision and in codes, transformers' caches, the floor.

    python -m benchmarks.packed.decode [--seen 8192 16384 32768 65536] [--rounds 15] [--threads 1] [--out FILE]
    python -m benchmarks.packed.decode --again  # measures nothing: the tables of the rows

Two layers of Qwen3-0.6B's shape with random weights, bfloat16, one row. Each round decodes one token with every cache,
in an order that changes; one thread is timed by the processor time that it gets. A row has the median of a cache, and
of its ratio to keepkv in full precision in the same round, with quartiles. The floor is every weight and every number
that a cache holds, read once at the speed at which memory was summed then. What a prompt says decides no time: while it
is read, attention returns zeros.

Peaks are of a process for each cache: the most memory while four tokens are decoded, beside what was there before.
transformers' quantised caches need optimum-quanto and hqq, in an environment of their own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, QuantizedCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import keepkv
from keepkv.bench.roofline import weight_bytes
from keepkv.bench.shapes import Shape
from keepkv.engine import interface
from keepkv.engine.handle import KVHandle
from keepkv.engine.versions import CACHE
from keepkv.measure import meters
from keepkv.measure.content import content
from keepkv.measure.environment import revision, versions

from .candidates import memory_floor, processor

RESULTS = Path(__file__).parent / "results" / "decode.jsonl"
SHAPE = Shape.read("layers=2,hidden=1024,heads=16,kv_heads=8,head_dim=128,intermediate=3072,vocab=4096")
DTYPE = torch.bfloat16
WARM = 3
MIB = 1 << 20
EXACT = "keepkv, 16 bits"
OURS = {EXACT: "none", "keepkv, int8": "int8", "keepkv, hadamard (4 bits)": "hadamard", "keepkv, kivi (2 bits)": "kivi"}
THEIRS = {"transformers, plain": None, "transformers, quanto 4 bits": "quanto", "transformers, hqq 4 bits": "hqq"}
TIMED = [name for name in (*OURS, *THEIRS) if name != "keepkv, kivi (2 bits)"]
NOTHING = "no cache"  # a short one: what the model takes by itself


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seen", type=int, nargs="*", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--peaks-at", type=int, default=16384, help="tokens seen where peaks are measured; 0: nowhere")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="only print the tables of the rows that there are")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.again:
        return print(tables([json.loads(line) for line in a.out.read_text(encoding="utf-8").splitlines()]))
    torch.set_num_threads(a.threads)
    if a.peak_of:
        return print(json.dumps(peak(a.peak_of, a.peaks_at)))
    used = versions() | {name: metadata.version(name) for name in ("optimum-quanto", "hqq")}
    made = {"cpu": processor(), "threads": a.threads, "shape": str(SHAPE), "versions": used, "revision": revision()}
    with a.out.open("w", encoding="utf-8") as file:
        rows = (row for seen in a.seen for row in timed(seen, a.rounds))
        for row in (*rows, *(peaks(a.peaks_at, a.threads) if a.peaks_at else ())):
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row | made) + "\n")


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: a token's time by tokens seen, and peaks."""
    times, found = [x for x in rows if "ms" in x], [x for x in rows if "extra_mib" in x]
    seen = sorted({x["seen"] for x in times})
    lines = [f"| seen | {' | '.join(f'{x:,}' for x in seen)} |", "|---" + "|--:" * len(seen) + "|"]
    for name in dict.fromkeys(x["cache"] for x in times):
        at = {x["seen"]: x for x in times if x["cache"] == name}
        cells = [f"{x['ratio']:.2f} ({x['ms']:.1f} ms, {x['over_floor']:.1f} × floor)" for x in map(at.get, seen) if x]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| cache | its bytes | beside them while decoding |", "|---|--:|--:|"]
    lines += [f"| {x['cache']} | {x['cache_mib']:.1f} MiB | {x['extra_mib']:.1f} MiB |" for x in found]
    return "\n".join(lines)


class Decoder:
    """A model and one of the caches, with ``seen`` random tokens in it."""

    def __init__(self, model: Any, name: str, seen: int) -> None:
        self.model = model
        if name in OURS:
            self.cache: Any = keepkv.Cache(model, "full", codec=OURS[name])
        elif (backend := THEIRS.get(name)) is not None:
            self.cache = QuantizedCache(backend, model.config, nbits=4)
        else:
            self.cache = DynamicCache(config=model.config)
        ids = torch.randint(SHAPE.vocab, (1, seen), generator=torch.Generator().manual_seed(0))
        with attending_to_nothing():
            self.feed(ids)

    def feed(self, ids: torch.Tensor) -> None:
        self.model(ids, **{CACHE: self.cache}, use_cache=True, logits_to_keep=1)

    def step(self) -> None:
        self.feed(torch.ones(1, 1, dtype=torch.long))


def model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(SHAPE.config(), attn_implementation="sdpa").to(DTYPE).eval()


@contextmanager
def attending_to_nothing() -> Iterator[None]:
    """Inside, attention is zeros, and caches are told that it is over."""

    def zeros(module: Any, query: torch.Tensor, key: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        if isinstance(key, KVHandle):
            key.layer.store.after_prefill()  # type: ignore[attr-defined]
        return torch.zeros_like(query.transpose(1, 2)), None

    functions: dict[str, Callable[..., Any]] = {"sdpa": sdpa_attention_forward, interface.NAME: interface.attention}
    for name in functions:
        AttentionInterface.register(name, zeros)
    try:
        yield
    finally:
        for name, function in functions.items():
            AttentionInterface.register(name, function)


@torch.inference_mode()
def timed(seen: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of every cache after ``seen`` tokens."""
    ours, theirs = model(), model()
    decoders = {name: Decoder(ours if name in OURS else theirs, name, seen) for name in TIMED}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for round_ in range(WARM + rounds):
        for name in random.Random(round_).sample(list(decoders), len(decoders)):
            started = clock()
            decoders[name].step()
            if round_ >= WARM:
                seconds[name].append(clock() - started)
    weights, per_byte = weight_bytes(ours.config, DTYPE, 1), memory_floor()
    for name, one in decoders.items():
        held, floor = content(one.cache)[0], 0.0
        floor = (weights + held) * per_byte
        low, _, high = quantiles([x / y for x, y in zip(seconds[name], seconds[EXACT], strict=True)], n=4)
        ratio = median(x / y for x, y in zip(seconds[name], seconds[EXACT], strict=True))
        yield {
            "cache": name, "seen": seen, "ms": round(median(seconds[name]) * 1e3, 2), "ratio": round(ratio, 3),
            "ratio_low": round(low, 3), "ratio_high": round(high, 3), "slot_mib": round(held / MIB, 2),
            "weight_mib": round(weights / MIB, 2), "floor_ms": round(floor * 1e3, 2),
            "over_floor": round(median(seconds[name]) / floor, 2), "gb_per_s": round(1e-9 / per_byte, 1),
        }  # fmt: skip


def peaks(seen: int, threads: int) -> Iterator[dict[str, Any]]:
    """Rows of the memory of every cache after ``seen`` tokens, each of a process."""
    for name in (NOTHING, *OURS, *THEIRS):
        command = [sys.executable, "-m", "benchmarks.packed.decode", "--peak-of", name, "--peaks-at", str(seen)]
        done = subprocess.run([*command, "--threads", str(threads)], check=True, capture_output=True, text=True)
        yield json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def peak(name: str, seen: int) -> dict[str, Any]:
    """The row of one cache: what it holds, and the most that decoding takes beside what was there."""
    one = Decoder(model(), EXACT if name == NOTHING else name, 64 if name == NOTHING else seen)
    for _ in range(WARM):
        one.step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what reading the prompt left behind
    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    with meters.Peak(torch.device("cpu")) as most:
        for _ in range(4):
            one.step()
    assert most.bytes is not None
    held = 0 if name == NOTHING else content(one.cache)[0]
    extra = most.bytes - before
    return {"cache": name, "seen": seen, "cache_mib": round(held / MIB, 2), "extra_mib": round(extra / MIB, 2)}


if __name__ == "__main__":
    main()
