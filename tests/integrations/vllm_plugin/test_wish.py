"""What a request asks for, as HTTP carries it; needs no vLLM."""

from typing import Any

import pytest

from keepkv.core.budget import Budget
from keepkv.errors import KeepKVError
from keepkv.integrations.vllm.served import last_queries, sees_all
from keepkv.integrations.vllm.wish import Wish, wish_of


def wish(default: dict[str, Any] | None = None, **keys: Any) -> Wish | None:
    return wish_of({f"keepkv_{name}": x for name, x in keys.items()}, default)


def test_nothing_asked_is_an_ordinary_request() -> None:
    assert wish_of(None, None) is None
    assert wish_of({"other": 1}, {}) is None
    assert wish_of({}, {"method": "snapkv"}) is None, "a default without a budget compresses what asks for one"


@pytest.mark.parametrize("keys", [{"budget": 1.0}, {"method": "full"}, {"method": "full", "budget": 0.5}])
def test_a_request_may_opt_out_of_the_default(keys: dict[str, Any]) -> None:
    assert wish({"method": "snapkv", "budget": 0.2}, **keys) is None


def test_texts_are_read_as_the_numbers_they_say() -> None:
    typed = wish(method="snapkv", budget=0.25, every=8, window=16, fill=True, seed=3)
    texts = wish(method="snapkv", budget="0.25", every="8", window="16", fill="true", seed="3")
    assert typed == texts and typed is not None
    assert (typed.method.window, typed.method.when.every, typed.fill, typed.settings.seed) == (16, 8, True, 3)
    percent = wish(method="snapkv", budget="25%")
    assert percent is not None and percent.budget == Budget(share=0.25)


def test_a_prompt_is_compressed_when_it_has_ended_whatever_the_method_does_elsewhere() -> None:
    made = wish(method="r-kv", budget=64)
    assert made is not None
    assert made.method.when.prefill == "deferred" and made.method.when.every == 128, "r-kv's own pace"


def test_options_of_the_default_go_with_its_method() -> None:
    default = {"method": "snapkv", "window": 16, "budget": 0.25, "every": 8}
    same, other = wish(default, budget=0.5), wish(default, method="knorm")
    assert same is not None and other is not None
    assert (same.method.name, same.method.window, same.method.when.every) == ("snapkv", 16, 8)
    assert (other.method.name, other.method.when.every, other.budget.share) == ("knorm", None, 0.25)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"method": "snapkv"}, "budget is missing"),
        ({"method": "snapk", "budget": 0.5}, "Did you mean 'snapkv'"),
        ({"method": "snapkv", "budget": 0.5, "windo": 3}, "Did you mean 'window'"),
        ({"window": 8, "budget": 0.5}, "keepkv_method"),
        ({"budge": 0.5}, "keepkv_budget"),
        ({"method": "snapkv", "budget": 10}, "Give at least 36"),
        ({"method": "snapkv", "budget": 0}, "a share of the tokens"),
        ({"method": "snapkv", "budget": "1MiB"}, "bytes belong to the server"),
        ({"method": "snapkv", "budget": "10%bytes"}, "bytes belong to the server"),
        ({"method": "snapkv", "budget": 0.5, "every": 0}, "every"),
        ({"method": "snapkv", "budget": 0.5, "fill": 2}, "fill"),
        ({"method": 3, "budget": 0.5}, "a name is expected"),
        ({"method": "kvzip", "budget": 0.5}, "Use 'keepkv2'"),
        ({"method": "keepkv2", "rehearsed": True, "budget": 0.5}, "rehearses questions"),
        ({"method": "expected-attention", "statistics": "stored", "budget": 0.5}, "keepkv calibrate query-statistics"),
        ({"method": "adakv", "score": "infinipot-v", "budget": 0.5}, "tokens are of images"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_remedy(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(KeepKVError, match=said):
        wish(**keys)


@pytest.mark.parametrize(
    ("method", "every_query", "queries"),
    [("snapkv", False, 32), ("keepkv", False, 32), ("keepkv2", False, 16), ("tova", False, 1), ("keydiff", False, 0),
     ("h2o", True, 0), ("g-kv", True, 16), ("expected-attention", True, 0), ("attention-matching", True, 0)],
)  # fmt: skip
def test_a_score_that_needs_every_query_is_known(method: str, every_query: bool, queries: int) -> None:
    made = wish(method=method, budget=0.5)
    assert made is not None
    assert (sees_all(made.method), last_queries(made.method)) == (every_query, queries)
