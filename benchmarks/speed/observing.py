"""What observing a decoded token allocates: bytes by the allocator's own events, at few and at many slots.

    python -m benchmarks.speed.observing [--out benchmarks/speed/results/observing.json]

A score that remembers queries needs no key, so its bytes must not grow with the slots. Freed memory counts too: what is
allocated and let go within a step still costs its writing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.measure.environment import MadeWith

SLOTS = (2048, 16384)
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("snapkv", {"store": "flat"}), ("snapkv", {"store": "int8"}), ("adakv", {}), ("keepkv2", {}),
    ("g-kv", {"store": "int8"}), ("expected-attention", {"store": "int8"}), ("h2o", {}),
)  # fmt: skip


def allocated(act: Callable[[], None]) -> int:
    """Bytes allocated on the CPU while ``act`` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        act()
    return sum(max(0, e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")


def observe(model: LlamaForCausalLM, method: str, options: dict[str, Any], slots: int) -> int:
    """Bytes that all layers allocate to observe one decoded token, with ``slots`` slots in each head."""
    cache = keepkv.Cache(model, method, slots, when=keepkv.When(every=64), **options)
    ids = torch.randint(3, 100, (1, slots + 256))
    spent = 0
    with torch.no_grad():
        for part in ids.split(1024, dim=1):
            model(input_ids=part, **{CACHE: cache}, logits_to_keep=1)
        model(input_ids=ids[:, :1], **{CACHE: cache})
        for layer in cache.layers:
            watched: Any = layer
            before = watched._observe

            def counted(*given: Any, before: Any = before) -> None:
                nonlocal spent
                spent += allocated(lambda: before(*given))

            watched._observe = counted
        model(input_ids=ids[:, :1], **{CACHE: cache})
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32768,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rows = []
    for method, options in CASES:
        few, many = (observe(model, method, options, slots) for slots in SLOTS)
        rows.append({"method": method, **options, **{f"bytes_{n}": x for n, x in zip(SLOTS, (few, many), strict=True)}})
        print(f"{method:20} {options.get('store', 'auto'):6} {few:12,} {many:12,}", flush=True)
    if given.out:
        facts = {"made_with": asdict(MadeWith.of(model, "random Llama, 2 layers, 2 KV heads")), "rows": rows}
        given.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
