"""Rows of different caches decode in one forward, each as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

import keepkv
from keepkv.engine.side_by_side import SideBySide
from keepkv.engine.versions import CACHE
from keepkv.errors import UnsupportedModel

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
