"""Where the time of a decoded token goes: operations by their own time, on the shapes of ``benchmarks/speed/speed.py``.

python -m benchmarks.speed.decode_profile --shape wide --method snapkv --slots 819
python -m benchmarks.speed.decode_profile --shape heavy --method adakv --slots 1638
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

import keepkv
from keepkv.engine.versions import CACHE

from .speed import GROUPED, HEAVY, QUICK, WIDE

SHAPES = {"wide": WIDE, "grouped": GROUPED, "heavy": HEAVY, "quick": QUICK}
KINDS = {  # of operations, by what their names begin with
    "weights: matrix products": ("aten::mm", "aten::addmm", "aten::linear"),
    "slots: attention": ("aten::_scaled_dot_product", "aten::bmm", "aten::_softmax", "aten::logsumexp"),
}
STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="wide")
    parser.add_argument("--method", default="snapkv")
    parser.add_argument("--slots", type=int, default=819, help="per KV head")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[a.shape].config()).eval()
    cache = keepkv.Cache(model, a.method, a.slots)
    ids = torch.randint(model.config.vocab_size, (1, 2 * a.slots))
    with torch.inference_mode():
        model(ids, **{CACHE: cache}, logits_to_keep=1)
        seconds = [step(model, cache) for _ in range(STEPS)][5:]
        with profile(activities=[ProfilerActivity.CPU]) as found:
            for _ in range(STEPS):
                step(model, cache)
    table(a, {event.key: event.self_cpu_time_total / STEPS for event in found.key_averages()}, median(seconds) * 1e6)


def step(model: torch.nn.Module, cache: keepkv.Cache) -> float:
    """Seconds of one token."""
    started = time.perf_counter()
    model(torch.ones(1, 1, dtype=torch.long), **{CACHE: cache})
    return time.perf_counter() - started


def table(a: argparse.Namespace, by_name: dict[str, float], total: float) -> None:
    """Markdown: µs per token. Python is what is left of a token that was not profiled."""
    shares = {kind: sum(us for name, us in by_name.items() if name.startswith(names)) for kind, names in KINDS.items()}
    shares["other operations"] = max(0.0, sum(by_name.values()) - sum(shares.values()))
    print(f"`{a.method}`, *{a.shape}*, {a.slots} slots, {a.threads} threads: {total / 1e3:.1f} ms\n")
    print("| | µs per token | share |\n|---|--:|--:|")
    for kind, us in shares.items():
        print(f"| {kind} | {us:,.0f} | {us / total:.0%} |")


if __name__ == "__main__":
    main()
