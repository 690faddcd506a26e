"""Requests that lose their blocks and come back go on as if nothing had happened."""

from typing import Any

import pytest
from vllm_engine import Engine, Reference, Request, agree

ENGINE = {"blocks": 60, "at_once": 256, "max_model_len": 1024}  # far too few for all of them


@pytest.mark.parametrize(
    ("keys", "tokens"),
    [({"method": "snapkv", "budget": 200}, 200), ({"method": "adakv", "budget": 0.5}, 160),
     ({"method": "keepkv", "budget": 180, "threshold": -1}, 200), ({"method": "keepkv2", "budget": 0.5}, 160),
     ({"method": "adakv", "budget": 150, "every": 48}, 250), ({"method": "h2o", "budget": 150, "every": 40}, 200),
     ({"method": "keepkv", "budget": 0.5, "threshold": -1, "allocate": "adakv", "every": 12}, 160)],
    ids=lambda x: x["method"] if isinstance(x, dict) else str(x),
)  # fmt: skip
def test_replies_are_the_same(engine: Engine, reference: Reference, keys: dict[str, Any], tokens: int) -> None:
    requests = [Request(280 + 13 * i, keys if i % 4 else {}, tokens=tokens, seed=i) for i in range(12)]
    before = preemptions(engine)
    agree(requests, engine.replies(requests), reference)
    assert preemptions(engine) > before, "nothing was preempted, so nothing was shown"
    assert engine.used == 0


def preemptions(engine: Engine) -> int:
    """As vLLM counts them."""
    found = [m.value for m in engine.llm.get_metrics() if m.name == "vllm:num_preemptions"]
    return int(sum(found))
