"""Rows of different caches decode in one forward, each as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

import keepkv
from keepkv.engine.side_by_side import SideBySide
from keepkv.engine.together import Together
from keepkv.engine.versions import CACHE
from keepkv.errors import UnsupportedModel
from keepkv.kernels.native import library
from keepkv.store.base import NO_STATS
from keepkv.store.dense import DenseStore

SMALL = {"window": 4, "sinks": 2}
ROWS: list[tuple[str, Any, dict[str, Any]]] = [
    ("snapkv", 12, SMALL), ("full", None, {}), ("adakv", 0.5, SMALL),
    ("keepkv2", 14, {**SMALL, "when": keepkv.When(every=2)}), ("h2o", 0.6, SMALL),
]  # fmt: skip


def read(model: Any, row: int) -> tuple[keepkv.Cache, Tensor]:
    method, budget, options = ROWS[row]
    ids = torch.randint(3, zoo.VOCAB, (1, 21 + 5 * row), generator=torch.Generator().manual_seed(row))
    cache = keepkv.Cache(model, method, budget, **options)
    return cache, step(model, cache, ids, 0)


@torch.inference_mode()
def step(model: Any, cache: Any, ids: Tensor, seen: int | list[int]) -> Tensor:
    places = torch.tensor(seen).view(-1, 1) + torch.arange(ids.shape[1])
    return model(input_ids=ids, position_ids=places, **{CACHE: cache}).logits[:, -1]


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gemma4", "gpt-oss", "phi3", "gpt-neox", "qwen3-moe"])
def test_rows_decode_as_if_alone(arch: str) -> None:
    model = zoo.model(arch)
    caches, logits = zip(*(read(model, i) for i in range(len(ROWS))), strict=True)
    twins = [cache.copy() for cache in caches]
    for _ in range(5):
        tokens = torch.cat([x.argmax(-1, keepdim=True) for x in logits])
        padded = torch.cat((tokens, torch.zeros(3, 1, dtype=torch.int64)))
        batch = SideBySide(caches)
        out = step(model, batch, padded, [cache.get_seq_length() for cache in caches] + [0] * 3)
        assert not batch.failed
        logits = tuple(out[i : i + 1] for i in range(len(caches)))
        for twin, token, mine in zip(twins, tokens, logits, strict=True):
            torch.testing.assert_close(step(model, twin, token[None], twin.get_seq_length()), mine, atol=2e-5, rtol=0)
    assert [x.report().kept for x in caches] == [x.report().kept for x in twins]


def test_a_row_that_fails_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.model("llama")
    caches, _ = zip(*(read(model, i) for i in range(3)), strict=True)
    twins = [cache.copy() for cache in caches]
    tokens = torch.tensor([[5], [6], [7]])

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("injected")

    caches[1].layers[2].attend = refuse
    batch = SideBySide(caches)
    out = step(model, batch, tokens, [cache.get_seq_length() for cache in caches])
    assert list(batch.failed) == [1] and str(batch.failed[1]) == "injected"
    whole = step(model, SideBySide(twins), tokens, [cache.get_seq_length() for cache in twins])
    assert torch.equal(out[[0, 2]], whole[[0, 2]])


def test_scores_that_look_at_hidden_states_do_so_in_each_row() -> None:
    model = zoo.model("llama")
    seen: list[tuple[int, int]] = []
    caches = [keepkv.Cache(model, "snapkv", 0.5, **SMALL) for _ in range(2)]
    for i, cache in enumerate(caches):
        score = cache.settings.method.score
        object.__setattr__(score, "needs_hidden", True)
        object.__setattr__(score, "token_stats", lambda hidden, known, i=i: seen.append((i, len(hidden))) or {})
    follow = pytest.importorskip("keepkv.engine.hidden")
    modules = [layer.self_attn for layer in model.model.layers]
    follow.follow_hidden(modules)
    try:
        batch = SideBySide(caches)
        step(model, batch, torch.tensor([[5], [6]]), [0, 0])
    finally:
        follow.unfollow_hidden(model)
    assert not batch.failed and seen == [(0, 1), (1, 1)] * len(modules)


def test_models_whose_rows_cannot_be_told_apart_are_refused() -> None:
    model = zoo.model("deepseek-v3")
    with pytest.raises(UnsupportedModel, match="told apart by rows"):
        SideBySide([keepkv.Cache(model, "full")])


SERVED: list[tuple[str, Any, dict[str, Any], bool]] = [
    ("snapkv", 12, SMALL, True), ("full", None, {}, True), ("keepkv", 16, SMALL, True), ("knorm", 0.4, SMALL, True),
    ("adakv", 0.5, SMALL, True), ("keepkv2", 14, SMALL, True),
    ("snapkv", 20, {**SMALL, "codec": "int8"}, False), ("h2o", 12, SMALL, False),
    ("h2o", 12, {**SMALL, "when": keepkv.When(every=3)}, False), ("g-kv", 16, {"window": 4}, False),
]  # fmt: skip


@pytest.mark.skipif(isinstance(library(), str), reason=f"no kernels in C++: {library()}")
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt-oss", "qwen3-moe"])
def test_one_call_for_many_rows_stores_and_answers_as_each_does(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of exact slots, ragged or not, are served together; others, and all of attention sinks, by themselves."""
    model, served = zoo.model(arch), set[int]()
    attend = Together.attend

    def watched(self: Together, *args: Any, **kwargs: Any) -> Any:
        found = attend(self, *args, **kwargs)
        served.update(self.at if found is not None else ())
        return found

    monkeypatch.setattr(Together, "attend", watched)
    caches, tokens = [], torch.randint(3, zoo.VOCAB, (6, len(SERVED), 1), generator=torch.Generator().manual_seed(1))
    for row, (method, budget, options, _) in enumerate(SERVED):
        ids = torch.randint(3, zoo.VOCAB, (1, 21 + 5 * row), generator=torch.Generator().manual_seed(row))
        caches.append(keepkv.Cache(model, method, budget, **options))
        step(model, caches[-1], ids, 0)
    twins = [cache.copy() for cache in caches]
    for new in tokens:
        mine = step(model, SideBySide(caches), new, [cache.get_seq_length() for cache in caches])
        monkeypatch.setenv("KEEPKV_KERNELS", "reference")
        own = step(model, SideBySide(twins), new, [cache.get_seq_length() for cache in twins])
        monkeypatch.delenv("KEEPKV_KERNELS")
        torch.testing.assert_close(mine, own, atol=2e-5, rtol=0)
    assert served == (set() if arch == "gpt-oss" else {i for i, one in enumerate(SERVED) if one[3]})
    for cache, twin in zip(caches, twins, strict=True):
        assert cache.get_seq_length() == twin.get_seq_length() and cache.report().bytes == twin.report().bytes
        for a, b in zip(cache.compressible, twin.compressible, strict=True):
            for name, x in a.store.tensors().items():
                torch.testing.assert_close(x, b.store.tensors()[name], atol=2e-5, rtol=1e-5)
        if (
            arch == "llama" and not cache.settings.method.score.observes
        ):  # what was written together is taken back like any other
            cache.crop(-2)
            twin.crop(-2)
            assert cache.get_seq_length() == twin.get_seq_length()


class Rounding(DenseStore):
    """What docs/write-a-store.md recommends: a layout that differs in one thing overrides that."""

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, stats: Any = NO_STATS) -> None:
        super().append(keys.bfloat16().to(keys.dtype), values, positions, stats)


def test_what_somebody_changed_runs_in_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout of one's own, a layer that was replaced; and an error there is of its row alone."""
    model = zoo.model("llama")
    caches, _ = zip(*(read(model, 0) for _ in range(3)), strict=True)
    for layer in caches[1].compressible:
        layer.store.__class__ = Rounding
    tokens = torch.tensor([[5], [6], [7]])
    for _ in range(3):
        batch = SideBySide(caches)
        step(model, batch, tokens, [cache.get_seq_length() for cache in caches])
        assert not batch.failed
    newest = [cache.compressible[0].store.recent.used()["keys"][:, :, -3:] for cache in caches]
    assert torch.equal(newest[1], newest[1].bfloat16().float())
    assert not torch.equal(newest[0], newest[0].bfloat16().float())

    def boom() -> Any:
        raise RuntimeError("injected")

    caches[2].compressible[1].store.room = boom
    batch = SideBySide(caches)
    step(model, batch, tokens, [cache.get_seq_length() for cache in caches])
    assert list(batch.failed) == [2] and str(batch.failed[2]) == "injected"
