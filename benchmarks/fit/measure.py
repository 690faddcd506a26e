"""Measured peaks beside those that ``keepkv.fit`` says beforehand, on random weights.

    python -m benchmarks.fit.measure                # each case in a process of its own, one after the other

A case is a model, a method and a chunk. Its process reads a prompt with ``generate`` and two meters: ``allocated``, the
largest sum of what torch's CPU allocator has given out and not yet got back, as torch.profiler saw it; and
``resident``, how far the high-water mark of the process's memory rose, the profiler's own included. The first counts
every tensor, those inside of kernels too; the second has in it what allocators round up and keep. Weights are there
before and in neither.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

import keepkv
from benchmarks.compression.cost import device_name
from keepkv.engine.versions import CACHE
from keepkv.measure import environment
from keepkv.measure.meters import Peak

RESULTS = Path(__file__).parent / "results"
CONTEXT, CHUNK, BUDGET, SEED = 2048, 512, 0.2, 0
_BASE: dict[str, Any] = dict(
    vocab_size=512, hidden_size=512, max_position_embeddings=65536, pad_token_id=0, bos_token_id=1, eos_token_id=None
)
SHAPES = {
    "llama": lambda: transformers.LlamaConfig(
        **_BASE, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, head_dim=128
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_BASE, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
        head_dim=128, sliding_window=512, layer_types=["sliding_attention"] * 5 + ["full_attention"],
    ),
    "deepseek": lambda: transformers.DeepseekV3Config(
        **_BASE, intermediate_size=1024, moe_intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, q_lora_rank=256, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=64,
        v_head_dim=64, n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
    ),
}  # fmt: skip
METHODS = {
    "llama": ["none", "keepkv"],
    "gemma3": ["none", "keepkv2"],
    "deepseek": ["none", "snapkv"],
}  # "none": transformers' own cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=3, metavar=("SHAPE", "METHOD", "CHUNK"), help="measure this one, here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.case is not None:
        print(json.dumps(measured(asked.case[0], asked.case[1], int(asked.case[2]))))
        return
    rows = []
    for shape, methods in METHODS.items():
        for method in methods:
            for chunk in (CONTEXT, CHUNK):
                words = [sys.executable, "-m", "benchmarks.fit.measure", "--case", shape, method, str(chunk)]
                found = subprocess.run(words, capture_output=True, text=True, check=True)
                rows.append(json.loads(found.stdout.splitlines()[-1]) | predicted(shape, method, chunk))
                print(json.dumps(rows[-1]), flush=True)
                write(rows, asked.out)


def measured(shape: str, method: str, chunk: int) -> dict[str, Any]:
    """Bytes that reading the prompt takes, and those of the cache when it is read."""
    torch.manual_seed(SEED)
    config = SHAPES[shape]()
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(2, config.vocab_size, (1, CONTEXT))
    read(model, ids[:, :128], method, 64)  # what is made once is there before
    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    with (
        Peak(torch.device("cpu")) as resident,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
    ):
        cache = read(model, ids, method, chunk)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    allocated = max(accumulate(e.nbytes() for e in events))
    held = None
    if method != "none":
        cache.compress()  # what the score remembers is let go, as before the first token of a reply
        held = cache.report().bytes
    return {
        "shape": shape, "method": method, "chunk": chunk, "allocated": allocated,
        "resident": None if resident.bytes is None else resident.bytes - before, "held": held,
    }  # fmt: skip


def read(model: Any, ids: torch.Tensor, method: str, chunk: int) -> Any:
    """The cache after ``generate`` has read the prompt; a deferred or shared compression is run too."""
    cache: Any = DynamicCache(config=model.config)
    if method != "none":
        cache = keepkv.Cache(model, method, BUDGET)
    size = chunk if chunk < ids.shape[1] else None
    with torch.inference_mode():
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False,
            prefill_chunk_size=size, **{CACHE: cache},
        )  # fmt: skip
    return cache


def predicted(shape: str, method: str, chunk: int) -> dict[str, Any]:
    """The same as ``keepkv.fit`` says it."""
    config: PreTrainedConfig = SHAPES[shape]()
    name = "full" if method == "none" else method
    found = keepkv.fit(
        config, CONTEXT, method=name, budget=BUDGET, dtype="float32", chunk=CHUNK, memory=1, device="cpu"
    )
    case = found.full if method == "none" else found.compressed
    assert case is not None
    peak = case.chunked_peak if chunk == CHUNK else case.peak
    return {"predicted": peak - found.weights, "predicted_held": case.cache, "weights": found.weights}


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """Rows with what they were made with, and a table."""
    about = {
        "device": device_name("cpu"), "dtype": "float32", "threads": torch.get_num_threads(), "context": CONTEXT,
        "chunk": CHUNK, "budget": BUDGET, "seed": SEED, "versions": environment.versions(),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "cpu.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    lines = [
        f"{about['device']}, float32, one prompt of {CONTEXT:,} tokens, budget {BUDGET}, seed {SEED}; MiB beside the "
        "weights.",
        "",
        "| model | method | prompt read | predicted | allocated | ratio | resident | cache predicted | cache |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        chunk = f"in chunks of {r['chunk']}" if r["chunk"] < CONTEXT else "in one piece"
        held = "" if r["held"] is None else f"{r['held'] / 2**20:.2f}"
        lines.append(
            f"| {r['shape']} | {r['method']} | {chunk} | {r['predicted'] / 2**20:.1f} | "
            f"{r['allocated'] / 2**20:.1f} | {r['predicted'] / r['allocated']:.3f} | {r['resident'] / 2**20:.1f} | "
            f"{r['predicted_held'] / 2**20:.2f} | {held} |"
        )
    (out / "cpu.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
