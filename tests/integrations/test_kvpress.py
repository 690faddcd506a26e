"""Scorers in the form of kvpress, which is not needed for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from running import LENGTHS, batch, generate, row
from torch import Tensor

import keepkv
from keepkv.errors import KeepKVError, UnsupportedInput
from keepkv.score import KeyDiff, KNorm


@dataclass
class Press:
    """As kvpress' ScorerPress is."""

    compression_ratio: float = 0.0

    def score(
        self, module: Any, hidden_states: Any, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> Tensor:
        raise NotImplementedError


class KeyDiffPress(Press):
    def score(self, module: Any, hidden_states: Any, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
        assert keys.shape[0] == 1 and rest[0] is None
        anchor = torch.nn.functional.normalize(keys, dim=-1).mean(2, keepdim=True)
        return -torch.nn.functional.cosine_similarity(keys, anchor, dim=-1)


def test_a_press_keeps_what_the_score_of_that_name_does() -> None:
    """Batched and padded, for the prompt and while decoding."""
    model, score = zoo.model("llama"), keepkv.from_kvpress(KeyDiffPress())
    for when in (keepkv.When(), keepkv.When(every=3)):
        caches = [keepkv.Cache(model, keepkv.Method(one, when=when), 14) for one in (score, KeyDiff())]
        outs = [generate(model, batch(), cache) for cache in caches]
        assert caches[0].report().compressed and torch.equal(outs[0].sequences, outs[1].sequences)
        for layer in range(3):
            assert torch.equal(caches[0].kept_positions(layer), caches[1].kept_positions(layer))
        for i in range(len(LENGTHS)):
            alone = generate(model, row(batch(), i), keepkv.Cache(model, keepkv.Method(score, when=when), 14))
            assert torch.allclose(alone.scores_[0], outs[0].scores_[i], atol=1e-5)


def test_methods_that_take_a_score_take_a_press() -> None:
    model = zoo.model("llama")
    cache = keepkv.Cache(model, "chunk", 14, score=keepkv.from_kvpress(KeyDiffPress()), size=8, window=0)
    generate(model, batch(), cache)
    assert cache.report().compressed


@pytest.mark.parametrize(
    ("look", "said"),
    [
        (lambda module, hidden, kwargs: module.q_proj(hidden), "module.q_proj"),
        (lambda module, hidden, kwargs: module.layer_idx, "module.layer_idx"),
        (lambda module, hidden, kwargs: hidden.shape, "hidden_states.shape"),
        (lambda module, hidden, kwargs: hidden[:, -4:], "hidden_states"),
        (lambda module, hidden, kwargs: torch.nn.functional.relu(hidden), "hidden_states"),
        (lambda module, hidden, kwargs: kwargs["position_embeddings"], "kwargs['position_embeddings']"),
    ],
)
def test_what_a_cache_does_not_have_is_refused_at_once(look: Any, said: str) -> None:
    class Looking(Press):
        def score(self, module: Any, hidden_states: Any, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
            look(module, hidden_states, rest[1])
            return keys.norm(dim=-1)

    with pytest.raises(KeepKVError, match="Looking looks at") as error:
        keepkv.from_kvpress(Looking())
    assert said in str(error.value) and "\n" not in str(error.value)


def test_presses_that_fail_say_so_where_they_are_asked() -> None:
    class Long(Press):
        def score(self, module: Any, hidden_states: Any, keys: Tensor, *rest: Any) -> Tensor:
            assert keys.shape[2] > 99, "too short"
            return keys.norm(dim=-1)

    class Wrong(Press):
        def score(self, module: Any, hidden_states: Any, keys: Tensor, *rest: Any) -> Tensor:
            return keys

    model = zoo.model("llama")
    for press, said in ((Long(), "AssertionError: too short"), (Wrong(), "returned")):
        with pytest.raises(KeepKVError, match=said):
            generate(model, batch(), keepkv.Cache(model, keepkv.Method(keepkv.from_kvpress(press)), 14))
    with pytest.raises(KeepKVError, match="object has no score"):
        keepkv.from_kvpress(object())


def test_a_class_of_presses_is_none() -> None:
    class Press:
        def score(self, *given: Any) -> Tensor:
            return given[2].norm(dim=-1)

    with pytest.raises(KeepKVError, match=r"Give a press: Press\(\)"):
        keepkv.from_kvpress(Press)


def test_heads_of_different_sizes_are_refused() -> None:
    model, score = zoo.model("llama"), keepkv.from_kvpress(KeyDiffPress())
    when = keepkv.When(every=2)
    cache = keepkv.Cache(model, "adakv", 14, score=score, window=0, when=when)
    with pytest.raises(UnsupportedInput, match="different numbers of slots"):
        generate(model, batch(), cache)


def test_the_random_numbers_of_the_caller_stay() -> None:
    class Random(Press):
        def score(self, module: Any, hidden_states: Any, keys: Tensor, *rest: Any) -> Tensor:
            return torch.rand(keys.shape[:3])

    before = torch.get_rng_state()
    score = keepkv.from_kvpress(Random())
    assert torch.equal(torch.get_rng_state(), before) and score != KNorm()
