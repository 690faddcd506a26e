"""Replies through vLLM are, token for token, those of ``keepkv.Cache`` in transformers."""

from typing import Any

import pytest
from served_methods import CALIBRATED, REFUSED
from vllm_engine import Engine, Reference, Request, agree

from keepkv.methods import METHODS as METHODS_OF_ALL

ENGINE = {"at_once": 160}  # prompts are read in chunks

METHODS: dict[str, dict[str, Any]] = {
    "snapkv": {}, "keydiff": {}, "knorm": {}, "streaming-llm": {}, "tova": {}, "random": {"seed": 5}, "r-kv": {},
    "adakv": {}, "keepkv": {"threshold": -1}, "keepkv2": {}, "pyramidkv": {}, "h2o": {}, "g-kv": {},
    "expected-attention": {}, "compactor": {}, "d2o": {}, "cam": {}, "grkv": {}, "reskv": {},
    "attention-matching": {}, "auto": {},
}  # fmt: skip
MORE: list[dict[str, Any]] = [
    {"method": "keepkv", "key": "bias", "threshold": -1, "allocate": "adakv", "budget": 0.2, "every": 12},
    {"method": "keepkv", "key": "code", "threshold": -1, "budget": 80, "every": 8},
    {"method": "keepkv2", "merge": -1, "budget": 0.2, "every": 16},
    {"method": "keepkv2", "allocate": "uniform", "budget": 64, "every": 3},
    {"method": "snapkv", "budget": 64, "every": 1},
    {"method": "snapkv", "budget": 600},  # more than the prompt has
    {"method": "snapkv", "budget": 330, "every": 8},  # which the reply outgrows
    {"method": "knorm", "budget": 1.0},
    {},
    {"method": "full"},
]


def wanted(budget: float | int, every: int | None) -> list[Request]:
    """A request for each method, of prompts of all lengths."""
    pace = {} if every is None else {"every": every}
    return [
        Request(300 + 17 * i, {"method": name, "budget": budget, **options, **pace}, seed=i)
        for i, (name, options) in enumerate(METHODS.items())
    ]


@pytest.mark.parametrize("every", [None, 8], ids=["once", "every-8"])
@pytest.mark.parametrize("budget", [0.25, 80], ids=["share", "slots"])
def test_every_method(engine: Engine, reference: Reference, budget: float | int, every: int | None) -> None:
    requests = [*wanted(budget, every), Request(333), Request(77)]
    agree(requests, engine.replies(requests), reference)
    assert engine.used == 0


def test_the_rest_of_the_registry(engine: Engine, reference: Reference) -> None:
    """Those of which ``test_vllm_registry`` says that they are served, which needs no vLLM, beside the ones above."""
    rest = [name for name in METHODS_OF_ALL if name not in (*METHODS, *REFUSED, *CALIBRATED, "full")]
    requests = [
        Request(280 + 11 * i, {"method": name, "budget": 90, "every": 8}, seed=i) for i, name in enumerate(rest)
    ]
    assert len(requests) > 20
    agree(requests, engine.replies(requests), reference)
    assert engine.used == 0


def test_options_and_ordinary_requests_in_one_batch(engine: Engine, reference: Reference) -> None:
    requests = [Request(310 + 7 * i, keys, seed=50 + i) for i, keys in enumerate(MORE)]
    agree(requests, engine.replies(requests), reference)


def test_compression_changes_the_reply(engine: Engine, reference: Reference) -> None:
    """Else the tests above would show nothing."""
    requests = wanted(80, None)
    plain = [Request(x.length, seed=x.seed) for x in requests]
    assert all(reference.reply(a) != reference.reply(b) for a, b in zip(requests, plain, strict=True))


def test_fill_keeps_what_lies_in_the_blocks_anyway(engine: Engine, reference: Reference) -> None:
    asked = {"method": "snapkv", "fill": True, "budget": 90}
    requests = [Request(350, asked, seed=80), Request(350, {**asked, "every": 8}, seed=81)]
    # 350 tokens end 30 slots into a block: 94 slots begin at a block's first. Every 8, the count follows the tokens.
    once = engine.replies(requests[:1])
    agree([Request(350, {"method": "snapkv", "budget": 94}, seed=80)], once, reference)
    assert len(engine.replies(requests)[1]) == requests[1].tokens
