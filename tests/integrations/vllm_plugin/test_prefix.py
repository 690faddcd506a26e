"""The prefix cache beside compression: what is shared is exact, and nothing that a compression writes is shared."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
from vllm_engine import BLOCK, Engine, Reference, Request, agree

from keepkv.integrations.vllm.plan import Plan

ENGINE = {"blocks": 300, "at_once": 512}
SHARED = 930
ASKED: list[dict[str, Any]] = [
    {"method": "snapkv", "budget": 0.25}, {"method": "adakv", "budget": 0.25},
    {"method": "keepkv", "budget": 0.25, "threshold": -1}, {"method": "keydiff", "budget": 100, "every": 8},
    {"method": "keepkv2", "budget": 0.2}, {"method": "pyramidkv", "budget": 0.25},
]  # fmt: skip


def prompt(seed: int, keys: dict[str, Any] | None = None, root: int = 0) -> Request:
    return Request(SHARED + 10 + seed, keys or {}, tokens=24, seed=seed, shared=SHARED, root=1000 + root)


@pytest.mark.parametrize("keys", ASKED, ids=lambda keys: keys["method"])
def test_plain_and_compressed_in_turn(engine: Engine, reference: Reference, keys: dict[str, Any]) -> None:
    engine.llm.reset_prefix_cache()
    hits = []
    for request in (prompt(1), prompt(2, keys), prompt(3), prompt(4, keys), prompt(4, keys), prompt(5)):
        agree([request], engine.replies([request]), reference)
        hits += engine.cached
    assert hits[0] == 0 and all(hits[1:])
    assert hits[1] == hits[3] < SHARED // BLOCK * BLOCK, "a compressed request computes what it may rewrite"
    assert hits[2] == hits[5] == SHARED // BLOCK * BLOCK, "an ordinary one hits all that is shared"
    assert engine.used == 0


@pytest.mark.parametrize("keys", ASKED, ids=lambda keys: keys["method"])
def test_what_a_compressed_request_leaves_is_exact(engine: Engine, reference: Reference, keys: dict[str, Any]) -> None:
    engine.llm.reset_prefix_cache()
    for request in (prompt(1, keys), prompt(2), prompt(3, keys)):
        agree([request], engine.replies([request]), reference)
    assert engine.cached[0] > 0


def test_many_on_one_prefix_at_once(engine: Engine, reference: Reference) -> None:
    engine.llm.reset_prefix_cache()
    requests = [prompt(10 + i, keys) for i, keys in enumerate([{}, *ASKED, {}])]
    for _ in range(2):
        agree(requests, engine.replies(requests), reference)
    assert sum(x > 0 for x in engine.cached) == len(requests)


@pytest.mark.parametrize("method", ["h2o", "g-kv"])
def test_a_score_that_needs_every_query_reads_nothing(engine: Engine, reference: Reference, method: str) -> None:
    engine.llm.reset_prefix_cache()
    requests = [prompt(1), prompt(2, {"method": method, "budget": 0.25}), prompt(3)]
    for request, hit in zip(requests, (False, False, True), strict=True):
        agree([request], engine.replies([request]), reference)
        assert (engine.cached[0] > 0) == hit


# --- without the rules, the tests above would fail --------------------------------------------------------------------


def broken(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    everything: Callable[[Plan], int] = lambda plan: plan.longest // BLOCK * BLOCK  # noqa: E731
    found = cached_property(everything)
    found.__set_name__(Plan, rule)
    monkeypatch.setattr(Plan, rule, found)


@pytest.mark.parametrize("rule", ["readable", "untouched"])
def test_without_the_rule_replies_are_wrong(
    engine: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    engine.llm.reset_prefix_cache()
    broken(rule, monkeypatch)
    keys = {"method": "snapkv", "budget": 0.25}
    requests = [prompt(1), prompt(1, keys), prompt(1)] if rule == "readable" else [prompt(2, keys), prompt(2)]
    wrong = [engine.replies([x]) != [reference.reply(x)] for x in requests]
    engine.llm.reset_prefix_cache()
    assert any(wrong)
