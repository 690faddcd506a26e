"""Many requests at random inside vLLM: nothing lost, mixed or leaked, and some replies against ``keepkv.Cache``.

    OMP_NUM_THREADS=1 python -m benchmarks.vllm.soak --requests 2000 --out benchmarks/vllm/results/soak.json

Methods, budgets, paces, lengths, shared beginnings and aborts are drawn from a seed; requests arrive while others run,
in a pool that is too small for them. Needs an environment with vLLM. What vLLM replied is kept beside ``--out``, and
``--compare`` with that file does the second half alone, which needs transformers only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from transformers import AutoModelForCausalLM

import keepkv
from benchmarks.vllm.ties import is_tie
from keepkv.engine.versions import CACHE
from keepkv.integrations.vllm.bench import Load, engine, preemptions
from keepkv.integrations.vllm.versions import installed
from keepkv.integrations.vllm.wish import wish_of
from keepkv.measure.environment import revision
from keepkv.measure.environment import versions as libraries

METHODS = [
    "adakv", "cam", "chunkkv", "compactor", "curdkv", "d2o", "dropkv", "expected-attention", "finch", "g-kv", "h2o",
    "keepkv", "keepkv2", "keydiff", "kvmerger", "lagkv", "leverage-score", "morphkv", "protected-lru", "pyramidkv",
    "r-kv", "random", "simlayerkv", "snapkv", "streaming-llm", "tova", "vase", "zeromerge",
]  # fmt: skip
ROOTS = 6  # beginnings that prompts may share


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default=keepkv.embedded_model())
    options.add_argument("--requests", type=int, default=2000)
    options.add_argument("--checked", type=float, default=0.1, help="share of the replies that are compared")
    options.add_argument("--waiting", type=int, default=24, help="requests that are in the engine at once, about")
    options.add_argument("--mib", type=float, default=10.0, help="KV memory")
    options.add_argument("--block", type=int, default=32)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--minutes", type=float, help="send no more after that")
    options.add_argument("--compare", action="store_true", help="compare the replies beside --out, and run nothing")
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    kept = given.out.with_suffix(".replies.json")
    if given.compare:
        whole = json.loads(kept.read_text())
        made_with, found = whole["made_with"], whole["found"]
    else:
        made_with = {k: str(v) for k, v in vars(given).items() if k not in ("out", "compare")} | libraries()
        made_with |= {"vllm": str(installed()), "device": "cpu", "dtype": "float32", "revision": str(revision())}
        found = served(given)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"made_with": made_with, "found": found}) + "\n")
    replies = {int(number): reply for number, reply in found.pop("replies").items()}
    rng = random.Random(given.seed)
    cases = [case(rng) for _ in range(given.requests)][: found["requests"]]
    found |= compare(given, cases, replies, random.Random(given.seed + 1))
    print(json.dumps(found))
    given.out.write_text(json.dumps({"made_with": made_with, **found}, indent=1) + "\n")


def served(given: Any) -> dict[str, Any]:
    """What vLLM replies, and what it leaves."""
    rng = random.Random(given.seed)
    cases, seconds = [case(rng) for _ in range(given.requests)], 60 * given.minutes if given.minutes else float("inf")
    load = Load(
        model=given.model, requests=given.requests, prompt=960, reply=64, kv_bytes=int(given.mib * 2**20),
        block=given.block, at_once=512, dtype="float32",
    )  # fmt: skip
    with engine(load, ours=True, enable_prefix_caching=True) as llm:
        started = time.perf_counter()
        found = run(llm, cases, given.waiting, rng, seconds)
        return {**found, "seconds": round(time.perf_counter() - started), "preemptions": preemptions(llm)}


def case(rng: random.Random) -> dict[str, Any]:
    """A request: its prompt, what it asks for, tokens of the reply, and after how many it is aborted, if it is."""
    shared = rng.choice([0, 0, 64, 200, 333])
    prompt = _tokens(rng.randrange(ROOTS), shared) + _tokens(rng.random(), rng.randint(20, 400))
    reply = rng.randint(1, 60)
    keys: dict[str, Any] = {}
    if rng.random() < 0.8:
        keys = {
            "method": rng.choice(METHODS),
            "budget": rng.choice([round(rng.uniform(0.1, 0.9), 2), rng.randint(40, 300)]),
        }
        if rng.random() < 0.5:
            keys["every"] = rng.choice([1, 3, 8, 20])
    return {"prompt": prompt, "keys": keys, "reply": reply, "abort": rng.randint(0, 40) if rng.random() < 0.1 else None}


def _tokens(seed: float, count: int) -> list[int]:
    own = random.Random(seed)
    return [own.randrange(5, 2000) for _ in range(count)]


def run(llm: Any, cases: list[dict[str, Any]], waiting: int, rng: random.Random, seconds: float) -> dict[str, Any]:
    """Cases through the engine, some aborted on their way, as many as can be sent in so many ``seconds``."""
    from vllm import SamplingParams

    end = time.monotonic() + seconds

    core, replies, steps, added = llm.llm_engine, dict[int, list[int]](), 0, 0
    scheduler = core.engine_core.engine_core.scheduler
    pool, age = scheduler.kv_cache_manager.block_pool, dict[int, int]()
    while added < len(cases) or core.has_unfinished_requests():
        if time.monotonic() > end:
            cases = cases[:added]
        while added < len(cases) and len(age) < waiting and rng.random() < 0.7:
            one = cases[added]
            extra = {f"keepkv_{name}": x for name, x in one["keys"].items()} or None
            sampling = SamplingParams(
                temperature=0, ignore_eos=True, detokenize=False, max_tokens=one["reply"], extra_args=extra
            )
            core.add_request(str(added), {"prompt_token_ids": one["prompt"]}, sampling)
            age[added] = 0
            added += 1
        for out in core.step():
            if out.finished:
                replies[int(out.request_id)] = list(out.outputs[0].token_ids)
                age.pop(int(out.request_id), None)
                if len(replies) % 100 == 0:
                    print(f"{len(replies)} replies after {steps} steps, {time.strftime('%X')}", flush=True)
        steps += 1
        for i in list(age):
            age[i] += 1
            if cases[i]["abort"] == age[i]:
                core.abort_request([str(i)])
                del age[i]
    lost = [i for i, x in enumerate(cases) if i not in replies and x["abort"] is None]
    short = [i for i, x in enumerate(cases) if x["abort"] is None and len(replies.get(i, [])) != x["reply"]]
    return {
        "requests": len(cases), "steps": steps, "replies": replies, "lost": len(lost), "cut_short": len(short),
        "aborted": sum(x["abort"] is not None and i not in replies for i, x in enumerate(cases)),
        "blocks_left_over": int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()),
        "plans_left_over": sum(len(m.forget(())) for m in scheduler.keepkv_managers),
    }  # fmt: skip


def compare(
    given: Any, cases: list[dict[str, Any]], replies: dict[int, list[int]], rng: random.Random
) -> dict[str, Any]:
    """Replies of a sample against transformers. Those that differ are ties where rounding alone decides: where
    noise of that size gives what vLLM said, or where transformers says something else in float64."""
    model = AutoModelForCausalLM.from_pretrained(given.model)
    wide = cache(partial(AutoModelForCausalLM.from_pretrained, given.model, dtype=torch.float64))  # if it is needed
    whole = [i for i, x in enumerate(cases) if x["abort"] is None]
    sample = rng.sample(whole, int(given.checked * len(whole)))
    wrong, ties = [], []
    for i in sample:
        one = cases[i]
        wish = wish_of({f"keepkv_{name}": x for name, x in one["keys"].items()}, None)
        said = partial(replied, model, one, None if wish is None else wish.budget)
        if (here := said(None if wish is None else wish.method)) == replies[i]:
            continue
        tie = wish is not None and (
            is_tie(wish.method, replies[i], said) or here != replied(wide(), one, wish.budget, wish.method)
        )
        (ties if tie else wrong).append(
            {"number": i, **{k: one[k] for k in ("keys", "reply")}, "prompt": len(one["prompt"])}
        )
    return {
        "compared": len(sample), "same": len(sample) - len(wrong) - len(ties), "ties": ties, "different": wrong,
        "compared_by_method": Counter(cases[i]["keys"].get("method", "none") for i in sample),
    }  # fmt: skip


def replied(model: Any, one: dict[str, Any], budget: Any, method: Any) -> list[int]:
    """What transformers replies to a case, with ``keepkv.Cache`` where there is a ``method``."""
    kept = {} if method is None else {CACHE: keepkv.Cache(model, method, budget)}
    ids = torch.tensor([one["prompt"]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=one["reply"], do_sample=False, eos_token_id=None,
        **kept,
    )  # fmt: skip
    said: list[int] = out[0, ids.shape[1] :].tolist()
    return said


if __name__ == "__main__":
    main()
