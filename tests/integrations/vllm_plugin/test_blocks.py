"""Blocks are given back when the plan says so, others run on them, and none is lost."""

from collections.abc import Iterator
from typing import Any

import pytest
from vllm_engine import BLOCK, TOKENS, Engine, Reference, Request, agree, parameters

from keepkv.integrations.vllm.plan import Plan

ENGINE = {"blocks": 128, "at_once": 512, "enable_prefix_caching": False}


def steps(engine: Engine, requests: list[Request], most: int = 2000) -> Iterator[int]:
    """Add ``requests`` and run to their end; after each step, how many run."""
    llm = engine.llm.llm_engine
    for i, request in enumerate(requests):
        llm.add_request(str(i), {"prompt_token_ids": request.prompt}, parameters(request))
    engine.done = {}  # type: ignore[attr-defined]
    for _ in range(most):
        if not llm.has_unfinished_requests():
            return
        for out in llm.step():
            if out.finished:
                engine.done[int(out.request_id)] = list(out.outputs[0].token_ids)  # type: ignore[attr-defined]
        yield len(engine.scheduler.running)
    raise AssertionError(f"not done after {most} steps")


def plan_of(engine: Engine) -> Plan:
    (plan,) = {id(p): p for m in engine.scheduler.keepkv_managers for p in m.plans.values()}.values()
    return plan


@pytest.mark.parametrize(
    "keys",
    [{"method": "keydiff", "budget": 0.1}, {"method": "snapkv", "budget": 100, "every": 16},
     {"method": "adakv", "budget": 0.1, "every": 8}, {"method": "keepkv2", "budget": 0.1}],
    ids=lambda keys: keys["method"],
)  # fmt: skip
def test_used_blocks_are_those_of_the_plan(engine: Engine, reference: Reference, keys: dict[str, Any]) -> None:
    request, length = Request(1500, keys, tokens=80), 1500
    plan, seen = None, []
    for step, running in enumerate(steps(engine, [request])):
        plan = plan or plan_of(engine)
        if running:
            computed = engine.scheduler.running[0].num_computed_tokens
            # The blocks of a step are allotted, and those before it given back, when the step begins.
            begun = computed - 1 if computed > length else computed - (step == 0) * computed
            if computed > length:
                assert engine.used == -(-computed // BLOCK) - plan.first_block(begun)
                seen.append(engine.used)
    assert engine.used == 0
    agree([request], [engine.done[0]], reference)  # type: ignore[attr-defined]
    assert plan is not None and seen[0] <= 9 < 47 == -(-length // BLOCK)


def test_a_pool_runs_more_requests_in_fewer_steps(engine: Engine, reference: Reference) -> None:
    counts = {}
    for name, keys in {"plain": {}, "snapkv": {"method": "snapkv", "budget": 0.25}}.items():
        requests = [Request(400, keys, tokens=64, seed=i) for i in range(24)]
        running = list(steps(engine, requests))
        counts[name] = max(running), len(running)
        agree(requests[::5], [engine.done[i] for i in range(0, 24, 5)], reference)  # type: ignore[attr-defined]
        assert engine.used == 0 and not engine.scheduler.keepkv_managers[0].req_to_blocks
    assert counts["snapkv"][0] >= 2 * counts["plain"][0], counts
    assert counts["snapkv"][1] <= 0.6 * counts["plain"][1], counts


@pytest.mark.parametrize("after", [1, 2, 3, 4, 9])
def test_an_aborted_request_leaves_nothing(engine: Engine, after: int) -> None:
    keys = {"method": "adakv", "budget": 0.2, "every": 4}
    requests = [Request(1000, keys, seed=1), Request(700, {"method": "keepkv2", "budget": 64}, seed=2), Request(400)]
    for step, _ in enumerate(steps(engine, requests)):
        if step == after:
            engine.llm.llm_engine.abort_request(["0", "1"])
    done = engine.done  # type: ignore[attr-defined]
    assert len(done[2]) == TOKENS and all(len(done.get(i, [])) < TOKENS for i in (0, 1))
    assert engine.used == 0
    assert engine.replies([Request(50)]) and not engine.scheduler.requests
