"""Compression as a pure function: on plain tensors it keeps what a cache keeps, and knows nothing of caches."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

import keepkv
from keepkv.core.slots import LayerView, Slots
from keepkv.engine.versions import CACHE
from keepkv.methods import apply
from keepkv.spans.rows import RowSpans

LENGTH, BUDGET = 40, 12
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("snapkv", {"window": 4}), ("keepkv", {"window": 4}), ("adakv", {"window": 4}), ("keepkv2", {"window": 4}),
    ("keydiff", {}), ("random", {}), ("pyramidkv", {"window": 4}), ("expected-attention", {}),
]  # fmt: skip


def plain_tensors(model: Any, ids: Tensor, method: keepkv.Method, seed: int = 0) -> list[LayerView]:
    """Views of a prompt, made of keys, values and queries that were caught on their way; the ropes are a probe's."""
    caught: list[tuple[Tensor, Tensor, Tensor, float]] = []
    probe = keepkv.Cache(model, method, 1.0)
    ropes = [layer.info.rope for layer in probe.compressible]
    cache = keepkv.Cache(model, "full")
    for layer in cache.compressible:

        def watch(module: Any, query: Tensor, rule: Any, layer: Any = layer, **kwargs: Any) -> Tensor:
            slots = layer.store.view()
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            caught.append((slots.keys.clone(), slots.values.clone(), query, scaling))
            return type(layer).attend(layer, module, query, rule, **kwargs)

        layer.attend = watch  # type: ignore[method-assign]
    with torch.no_grad():
        model(input_ids=ids, **{CACHE: cache})
    views = []
    for i, (keys, values, query, scaling) in enumerate(caught):
        b, h, s, _ = keys.shape
        positions = torch.arange(s, dtype=torch.int32).expand(b, h, s).clone()
        stats = {name: torch.full((b, h, s), start) for name, start in starts(method).items()}
        slots = Slots(keys, values, torch.zeros(b, h, s), positions, stats)
        seen = torch.full((b,), s)
        view = LayerView(
            slots, query, torch.arange(s).expand(b, s), seen, scaling, rope=ropes[i], layer=i, layers=len(caught),
            seed=seed,
        )  # fmt: skip
        if method.score.observes:
            method.score.observe(view)
        views.append(view)
    return views


def starts(method: keepkv.Method) -> dict[str, float]:
    return {name: getattr(x, "start", x) for name, x in method.score.stats.items()}


@pytest.mark.parametrize("spans", [None, [keepkv.Span(5, 9, "protect"), keepkv.Span(10, 30)]], ids=["", "spans"])
@pytest.mark.parametrize("method", METHODS, ids=lambda pair: pair[0])
def test_a_cache_keeps_what_the_function_keeps(method: tuple[str, dict[str, Any]], spans: Any) -> None:
    model, ids = zoo.model("llama"), torch.randint(3, zoo.VOCAB, (2, LENGTH))
    name, options = method
    # Scored by the queries of its own span, a view needs intervals: here scores are the method's own.
    policy = None if spans is None else keepkv.SpanPolicy(spans, scoring="global")
    cache = keepkv.Cache(model, name, BUDGET, sinks=2, spans=policy, **options)
    with torch.no_grad():
        model(input_ids=ids, **{CACHE: cache})
    rows = None
    if policy is not None:
        rows = RowSpans(policy)
        rows.begin(2, ids.device)
    chosen = cache.settings.method
    views = plain_tensors(model, ids, chosen)
    budgets = [torch.full((2,), BUDGET) for _ in views]
    if name == "pyramidkv":
        seen = torch.full((2,), LENGTH)
        held = 0 if rows is None else rows.protected_tokens(seen)
        mean = torch.full((2,), float(BUDGET)) - held
        budgets = [
            chosen.allocate.layer_budget(mean, i, len(views), seen - held).long() + held for i in range(len(views))
        ]
    done = apply.compress(chosen, views, budgets, rows)
    for layer, reduced in zip(cache.compressible, done, strict=True):
        got, want = reduced.slots, layer.store.view()
        assert torch.equal(got.lengths, want.lengths) and int(want.lengths.max()) < LENGTH
        assert torch.equal(got.positions[got.valid], want.positions[want.valid])
        for one, two in ((got.keys, want.keys), (got.values, want.values), (got.log_votes, want.log_votes)):
            assert torch.allclose(one[got.valid], two[want.valid].to(one.dtype), atol=1e-6)


def test_a_row_that_fits_keeps_everything() -> None:
    model, ids = zoo.model("llama"), torch.randint(3, zoo.VOCAB, (2, LENGTH))
    method = keepkv.Cache(model, "snapkv", BUDGET, window=4, sinks=2).settings.method
    views = plain_tensors(model, ids, method)[:1]
    [reduced] = apply.compress(method, views, [torch.tensor([BUDGET, LENGTH])])
    assert reduced.slots.lengths.tolist() == [[BUDGET] * 2, [LENGTH] * 2]


def test_spans_that_do_not_fit_are_refused() -> None:
    model, ids = zoo.model("llama"), torch.randint(3, zoo.VOCAB, (2, LENGTH))
    method = keepkv.Cache(model, "keydiff", BUDGET).settings.method
    spans = RowSpans(keepkv.SpanPolicy([keepkv.Span(0, 30, "protect")]))
    spans.begin(2, ids.device)
    with pytest.raises(keepkv.KeepKVError, match=r"row 0: .* need 30 slots per head, the budget holds 12"):
        apply.compress(method, plain_tensors(model, ids, method)[:1], [torch.tensor([BUDGET, BUDGET])], spans)


def test_it_knows_no_transformers() -> None:
    """A serving engine imports it without transformers' cache, our layers or stores."""
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import types; package = types.ModuleType('keepkv'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['keepkv'] = package\n"
        "import keepkv.methods.apply\n"
        "assert not any(name.startswith(('keepkv.engine', 'keepkv.store')) for name in sys.modules)\n"
    )
    path = keepkv.__path__[0]
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
