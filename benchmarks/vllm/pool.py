"""A fixed memory inside vLLM: how many requests run at once, in how many steps, and which blocks they hold.

    OMP_NUM_THREADS=1 python -m benchmarks.vllm.pool --out benchmarks/vllm/results/pool.json

Needs an environment with vLLM (`make test-vllm` makes one). Each row has the same bytes of KV
memory: vLLM as it is, and vLLM with keepkv. Prompts are random tokens, replies have a fixed length.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # steps are made by hand
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import keepkv

ASKED: dict[str, dict[str, Any] | None] = {
    "vllm": None,
    "keepkv, nothing asked": {},
    "snapkv, 25 %": {"method": "snapkv", "budget": 0.25},
    "snapkv, 25 %, filled": {"method": "snapkv", "budget": 0.25, "fill": True},
    "adakv, 25 %": {"method": "adakv", "budget": 0.25},
    "keepkv2, 25 %": {"method": "keepkv2", "budget": 0.25},
    "keepkv2, 12.5 %": {"method": "keepkv2", "budget": 0.125},
    "keepkv, 12.5 %": {"method": "keepkv", "budget": 0.125},
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default=keepkv.embedded_model())
    options.add_argument("--requests", type=int, default=24)
    options.add_argument("--prompt", type=int, default=800)
    options.add_argument("--reply", type=int, default=64)
    options.add_argument("--mib", type=float, default=12.0, help="KV memory")
    options.add_argument("--block", type=int, default=32)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    rows = []
    for ours in (False, True):
        llm = engine(given, ours)
        for name, keys in ASKED.items():
            if (keys is not None) == ours:
                rows.append({"name": name, "asked": keys, **measure(llm, given, keys or {})})
                print(line(rows[-1]), flush=True)
        llm.llm_engine.engine_core.shutdown()
    if given.out:
        made_with = {k: str(v) for k, v in vars(given).items() if k != "out"} | versions()
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({"made_with": made_with, "rows": rows}, indent=1) + "\n")


def engine(given: Any, ours: bool, prefix_caching: bool = False) -> Any:
    """vLLM with so many bytes of KV memory; ``ours``: with keepkv inside."""
    from vllm import LLM

    from keepkv.integrations.vllm import engine_args

    return LLM(
        given.model, skip_tokenizer_init=True, enforce_eager=True, dtype="float32", block_size=given.block,
        max_model_len=1024, max_num_batched_tokens=512, enable_prefix_caching=prefix_caching, disable_log_stats=False,
        kv_cache_memory_bytes=int(given.mib * 2**20), **(engine_args() if ours else {}),
    )  # fmt: skip


def measure(llm: Any, given: Any, keys: dict[str, Any]) -> dict[str, Any]:
    """Send all requests at once, and look after each step."""
    from vllm import SamplingParams

    extra = {f"keepkv_{name}": x for name, x in keys.items()} or None
    core, rng = llm.llm_engine, random.Random(0)
    scheduler = core.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    before, started = preemptions(llm), time.perf_counter()
    for i in range(given.requests):
        prompt = [rng.randrange(5, 2000) for _ in range(given.prompt)]
        sampling = SamplingParams(
            temperature=0, ignore_eos=True, detokenize=False, max_tokens=given.reply, extra_args=extra
        )
        core.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
    running, used = [], []
    while core.has_unfinished_requests():
        core.step()
        running.append(len(scheduler.running))
        used.append(int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()))
    return {
        "blocks": pool.num_gpu_blocks - 1, "most_at_once": max(running), "steps": len(running),
        "mean_at_once": round(sum(running) / len(running), 1), "preemptions": preemptions(llm) - before,
        "seconds": round(time.perf_counter() - started, 1), "left_over": used[-1], "used": used,
    }  # fmt: skip


def preemptions(llm: Any) -> int:
    return int(sum(x.value for x in llm.get_metrics() if x.name == "vllm:num_preemptions"))


def versions() -> dict[str, str]:
    import torch

    from keepkv.integrations.vllm.versions import installed

    return {"vllm": str(installed()), "torch": torch.__version__, "keepkv": keepkv.__version__}


def line(row: dict[str, Any]) -> str:
    return "| {name} | {blocks} | {most_at_once} | {mean_at_once} | {steps} | {preemptions} | {seconds} |".format(**row)


if __name__ == "__main__":
    main()
