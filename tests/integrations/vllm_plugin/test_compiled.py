"""A model that vLLM compiles: keepkv's attention stays a call of its own between the pieces."""

from typing import Any

from vllm_engine import Engine, Reference, Request, agree

ENGINE = {"enforce_eager": False, "at_once": 160}


def test_replies_are_the_same(engine: Engine, reference: Reference) -> None:
    asked: list[dict[str, Any]] = [
        {}, {"method": "snapkv", "budget": 0.25}, {"method": "adakv", "budget": 0.25, "every": 8},
        {"method": "keepkv2", "budget": 64, "every": 8}, {"method": "keepkv", "budget": 0.3, "threshold": -1},
    ]  # fmt: skip
    requests = [Request(250 + 20 * i, keys, seed=i) for i, keys in enumerate(asked)]
    agree(requests, engine.replies(requests), reference)
