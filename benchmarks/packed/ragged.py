"""What heads of different lengths cost a decoded token, beside heads of one length: one model, equal slots, in turns.

    python -m benchmarks.packed.ragged [--slots 1024] [--rounds 140] [--threads 1] [--out FILE]

snapkv gives every head the same number of slots, adakv shares the same sum between heads. Each round steps both once,
adakv a second time in plain torch alone, in an order that changes. A row has the median of the ratios of a round and
its quartiles. One thread is timed by the processor time that it gets.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median, quantiles

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.kernels.dispatch import VARIABLE
from keepkv.measure.environment import revision, versions

from .candidates import processor

RESULTS = Path(__file__).parent / "results" / "ragged.jsonl"
WARM = 10
WAYS = {"equal": ("snapkv", "auto"), "ragged, C++": ("adakv", "auto"), "ragged, plain torch": ("adakv", "reference")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=1024, help="per KV head")
    parser.add_argument("--rounds", type=int, default=140)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    made = {"cpu": processor(), "threads": a.threads, "versions": versions(), "revision": revision()}
    with a.out.open("w", encoding="utf-8") as file, torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            seconds = stepped(dtype, a.slots, a.rounds)
            for way, own in seconds.items():
                ratios = [x / y for x, y in zip(own, seconds["equal"], strict=True)]
                low, _, high = quantiles(ratios, n=4)
                row = {
                    "way": way, "dtype": str(dtype).removeprefix("torch."), "slots": a.slots,
                    "ms": round(median(own) * 1e3, 2), "ratio": round(median(ratios), 3),
                    "ratio_low": round(low, 3), "ratio_high": round(high, 3),
                }  # fmt: skip
                print(json.dumps(row), flush=True)
                file.write(json.dumps(row | made) + "\n")


def stepped(dtype: torch.dtype, slots: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step by way: 4 layers, hidden size 512, 8 query and 4 KV heads of 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=1 << 17,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    caches, ids = {}, torch.randint(config.vocab_size, (1, 2 * slots))
    for way, (method, _) in WAYS.items():
        caches[way] = keepkv.Cache(model, method, slots)
        model(ids, **{CACHE: caches[way]}, logits_to_keep=1)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for round_ in range(WARM + rounds):
        for way in list(WAYS) if round_ % 2 else reversed(WAYS):
            os.environ[VARIABLE] = WAYS[way][1]
            started = clock()
            model(torch.ones(1, 1, dtype=torch.long), **{CACHE: caches[way]})
            if round_ >= WARM:
                seconds[way].append(clock() - started)
    return seconds


if __name__ == "__main__":
    main()
