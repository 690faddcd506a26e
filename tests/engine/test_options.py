"""Wrong options of every registered piece: each is refused when the cache is made, or the cache works."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any

import numpy as np
import pytest
import torch
import transformers as t

import keepkv
from keepkv.allocate.base import ALLOCATIONS
from keepkv.core.options import one_of, shown
from keepkv.errors import BudgetError, CacheStateError, KeepKVError
from keepkv.methods import METHODS
from keepkv.reduce import REDUCTIONS
from keepkv.score import SCORES, KeyDiff
from keepkv.score.queries.remembering import Remembering
from keepkv.store import CODECS, STORES

BUDGET = 8
WRONG: list[Any] = [
    -3, 0, 1, 2.5, 5e-324, 1e-9, 1e9, 1e300, math.nan, math.inf, True, None,
    "x", "", [], {}, object(), 2**31, 10**30, 10**5000,
    np.int64(3), np.float32(0.5), np.float64("nan"), np.bool_(True), torch.tensor(3), int,
]  # fmt: skip


@cache
def model() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=64)
    return t.LlamaForCausalLM(t.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()


def names_of(factory: Callable[..., Any]) -> list[str]:
    """The options of a factory."""
    return [name for name, p in inspect.signature(factory).parameters.items() if p.default is not p.empty]


def works(make: Callable[[], keepkv.Cache]) -> None:
    """``make`` raises ``KeepKVError``, in one short line, or returns a cache that reads, compresses and answers, or
    says of this text that it does not fit."""
    try:
        made = make()
    except KeepKVError as error:
        assert len(str(error)) < 400 and "\n" not in str(error)
        return
    with suppress(BudgetError, CacheStateError):
        answers(made)


def answers(made: keepkv.Cache) -> None:
    ids = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model()(ids, past_key_values=made)
        made.compress()
        for token in (5, 6):
            logits = model()(torch.tensor([[token]]), past_key_values=made).logits
    assert torch.isfinite(logits).all()
    assert int(made.seen) == 22


def method(**pieces: Any) -> keepkv.Method:
    """One that recompresses while decoding, from pieces that do with anything else."""
    return keepkv.Method(**{"score": Remembering(KeyDiff(), 4), "when": keepkv.When(every=2), "sinks": 2, **pieces})


def of_method(name: str, **options: Any) -> keepkv.Cache:
    when = {} if name == "full" or "when" in options else {"when": keepkv.When(every=2)}
    small = {x: 2 for x in ("sinks", "window") if x in names_of(METHODS.factory(name))}
    return keepkv.Cache(model(), name, BUDGET, **{**when, **small, **options})


def of_score(name: str, **options: Any) -> keepkv.Cache:
    return keepkv.Cache(model(), method(score=SCORES.factory(name)(**options)), BUDGET)


def of_allocation(name: str, **options: Any) -> keepkv.Cache:
    return keepkv.Cache(model(), method(allocate=ALLOCATIONS.factory(name)(**options)), BUDGET)


def of_reduction(name: str, **options: Any) -> keepkv.Cache:
    return keepkv.Cache(model(), method(reduce=REDUCTIONS.factory(name)(**options)), BUDGET)


def of_store(name: str, **options: Any) -> keepkv.Cache:
    return keepkv.Cache(model(), method(), BUDGET, store=name, store_options=options)


def of_codec(name: str, **options: Any) -> keepkv.Cache:
    return keepkv.Cache(model(), method(), BUDGET, codec=name, codec_options=options)


def of_other(name: str, /, **options: Any) -> keepkv.Cache:
    """Schedules, budgets, spans, policies, methods and caches."""
    spans = [keepkv.Span(0, 4)]
    made: dict[str, Callable[[], keepkv.Cache]] = {
        "when": lambda: keepkv.Cache(model(), method(when=keepkv.When(**options)), BUDGET),
        "budget": lambda: keepkv.Cache(model(), method(), keepkv.Budget(**options)),
        "method": lambda: keepkv.Cache(model(), method(**options), BUDGET),
        "span": lambda: keepkv.Cache(
            model(), method(), BUDGET, spans=[keepkv.Span(**{"start": 0, "end": 9, **options})]
        ),
        "policy": lambda: keepkv.Cache(
            model(), method(), BUDGET, spans=keepkv.SpanPolicy(**{"spans": spans, **options})
        ),
        "cache": lambda: keepkv.Cache(model(), **{"method": "snapkv", "budget": 40, **options}),
    }
    return made[name]()


OTHER: dict[str, list[str]] = {
    "when": ["prefill", "every"],
    "budget": ["share", "slots", "bytes"],
    "method": [x.name for x in fields(keepkv.Method)],
    "span": [x.name for x in fields(keepkv.Span)],
    "policy": [x.name for x in fields(keepkv.SpanPolicy)],
    "cache": [x for x in names_of(keepkv.Cache) if x != "method"] + ["method"],
}
REGISTERED = ((of_method, METHODS), (of_score, SCORES), (of_allocation, ALLOCATIONS), (of_reduction, REDUCTIONS),
              (of_store, STORES), (of_codec, CODECS))  # fmt: skip
CASES = [
    pytest.param(make, name, names_of(registry.factory(name)), id=f"{registry.kind}-{name}")
    for make, registry in REGISTERED
    for name in registry
] + [pytest.param(of_other, name, names, id=name) for name, names in OTHER.items()]


@pytest.mark.parametrize(("make", "name", "options"), CASES)
def test_every_wrong_option_is_refused_or_works(make: Any, name: str, options: list[str]) -> None:
    """Without the checks 2,320 of 5,214 values tried so gave a raw error or NaN, or ran without an end."""
    wrong = {}
    for option in options:
        for value in WRONG:
            try:
                works(lambda option=option, value=value: make(name, **{option: value}))
            except Exception as error:
                wrong[option, shown(value)] = f"{type(error).__name__}: {error}"
    assert not wrong


def test_pieces_of_ones_own_are_checked_too() -> None:
    """By the types of their fields, and by what these are annotated with; numbers of numpy become plain ones."""

    @dataclass(frozen=True)
    class Mine(keepkv.Score):
        scale: float = 1.0
        size: int = 4
        mode: Annotated[str, one_of("a", "b")] = "a"

        def __call__(self, view: keepkv.LayerView) -> torch.Tensor:
            return self.scale * view.slots.positions.float()

    mine = Mine(np.float32(0.5), np.int64(3))  # type: ignore[arg-type]
    assert (mine.scale, mine.size) == (0.5, 3) and type(mine.scale) is float and type(mine.size) is int
    for options in ({"scale": math.nan}, {"scale": "x"}, {"size": True}, {"size": 2.5}, {"mode": "c"}):
        with pytest.raises(KeepKVError, match=f"Mine: {next(iter(options))}="):
            Mine(**options)  # type: ignore[arg-type]


def test_defaults_fit() -> None:
    """Every piece can be made without options, but those that must be given something."""
    for _, registry in REGISTERED[:4]:
        for name in registry:
            registry.build(name)


def test_refusals_name_what_is_known() -> None:
    with pytest.raises(KeepKVError, match=r"store 'static'.*'x'.*Its options: capacity"):
        keepkv.Cache(model(), "snapkv", 0.5, store="static", store_options={"x": 1})
    with pytest.raises(KeepKVError, match=r"store 'dense'.*'x'.*Its options: exact_first, exact_last"):
        keepkv.Cache(model(), "snapkv", 0.5, store_options={"x": 1})
    with pytest.raises(KeepKVError, match=r"store 'dense': multiple values for argument 'held'"):
        keepkv.Cache(model(), "snapkv", 0.5, store_options={"held": 1})
    with pytest.raises(KeepKVError, match=r"codec_options=.* is not a dict"):
        keepkv.Cache(model(), "snapkv", 0.5, codec_options={1: 2})  # type: ignore[dict-item]
    with pytest.raises(KeepKVError, match=r"when='deferred' is not a keepkv.When, such as keepkv.When\('deferred'\)"):
        keepkv.Cache(model(), "snapkv", 0.5, when="deferred")
    with pytest.raises(KeepKVError, match=r"when='deferred' is not a keepkv.When"):
        keepkv.Cache(model(), "snapkv", 0.5).copy(when="deferred")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    ["9" * 400 + "GiB", "9" * 5000, "1e3", "nan", "-1", "0", "0B", "2.0", 0, -1, 1.5, 10**400, True, None, [], {}],
)
def test_budgets_that_mean_nothing(value: Any) -> None:
    with pytest.raises(BudgetError) as refused:
        keepkv.Budget.of(value)
    assert len(str(refused.value)) < 400


def test_budgets_of_numpy() -> None:
    assert keepkv.Budget.of(np.int64(12)) == keepkv.Budget(slots=12)  # type: ignore[arg-type]
    assert keepkv.Budget.of(np.float32(0.5)) == keepkv.Budget(share=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [{}, {"share": 2.0}, {"share": -1}, {"share": math.nan}, {"share": 0.5, "slots": 3}])
def test_a_budget_is_one_of_three(fields: dict[str, Any]) -> None:
    with pytest.raises(BudgetError):
        keepkv.Budget(**fields)


def test_names_differ_in_case_as_one_likes() -> None:
    model = t.LlamaForCausalLM(
        t.LlamaConfig(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    )
    cache = keepkv.Cache(model, "SnapKV", "25%", store="Dense", codec="INT8")
    assert (cache.settings.method.name, cache.layout, cache.codec) == ("snapkv", "dense", "int8")
