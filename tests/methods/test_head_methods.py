"""Methods that share a budget by layers and heads: what a cache then holds."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import zoo
from matrix import random_profile
from running import batch, generate, plain
from torch import Tensor

import keepkv
from keepkv.allocate import ALLOCATIONS, AdaKV, HeadBudget
from keepkv.calibrate import KINDS
from keepkv.engine.versions import CACHE
from keepkv.errors import CalibrationError, KeepKVError, UnknownName
from keepkv.integrations.vllm.served import check_method
from keepkv.methods import make_method

torch.set_num_threads(1)


def filled(name: str, budget: int, tokens: int = 60, model: str = "llama", **options: Any) -> keepkv.Cache:
    """A cache that has read a row of random tokens."""
    network = zoo.model(model)
    cache = keepkv.Cache(network, name, budget, **options)
    with torch.no_grad():
        network(torch.randint(3, zoo.VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0)), **{CACHE: cache})
    return cache


def held(cache: keepkv.Cache) -> list[list[int]]:
    return [rows[0] for rows in cache.report().kept.values()]


@pytest.mark.parametrize("integration", ["flat", "two_level"])
def test_heads_hold_what_the_profile_gives_them(integration: str) -> None:
    """c and what is protected, in a ragged store, whose memory is that of what is held."""
    known = random_profile(zoo.model("llama"))
    scores = [x for layer in known.tensors.values() for x in layer["heads_inf"].tolist()]
    cache = filled("surface-logic-kv", 20, 400, sinks=2, window=4, calibration=known, integration=integration)
    got = [n for heads in held(cache) for n in heads]
    assert sum(got) == 6 * 20 and len({*got}) > 3
    if integration == "flat":
        lifted = [s + 0.01 * s / sum(scores[i - i % 2 : i - i % 2 + 2]) for i, s in enumerate(scores)]
        b, pool = 14, 6 * math.floor(14 / 1.351) - 6 * 0.5
        wanted = [6 + s / sum(lifted) * pool + b - math.floor(b / 1.351) + 0.5 for s in lifted]
        assert all(abs(n - c) < 1 for n, c in zip(got, wanted, strict=True))
    for layer, heads in zip(cache.compressible, held(cache), strict=True):
        assert layer.store.lengths[0].tolist() == heads
        at = cache.kept_positions(layer.info.index)[0]
        assert all({0, 1, 396, 397, 398, 399} <= set(row.tolist()) for row in at)


def test_room_for_everything_is_the_full_cache() -> None:
    model = zoo.model("llama")
    for name in ("surface-logic-kv", "headkv", "duo-attention", "lukv"):
        cache = keepkv.Cache(model, name, 80, sinks=2, window=4, calibration=random_profile(model))
        out = generate(model, batch(), cache)
        assert torch.equal(out.sequences, plain("llama").sequences), name
        assert torch.allclose(out.scores_, plain("llama").scores_, atol=1e-5), name


def test_any_score_goes_inside() -> None:
    known = random_profile(zoo.model("llama"))
    for score in ("keydiff", "expected-attention", "tova"):
        cache = filled("surface-logic-kv", 20, sinks=2, window=4, score=score, calibration=known)
        assert sum(map(sum, held(cache))) == 6 * 20
    assert make_method("headkv", {"window": 8}).score == make_method("surface-logic-kv", {"window": 8}).score


def test_behaviours_choose_the_profile() -> None:
    chosen = {
        (behaviour, use): make_method("surface-logic-kv", {"behaviour": behaviour, "use": use}).allocate.profile  # type: ignore[attr-defined]
        for behaviour in ("confusion", "copy_vs_compose")
        for use in ("both", "surface", "logic")
    }
    assert list(chosen.values()) == ["inf", "precision", "recall", "copy+compose", "copy", "compose"]
    with pytest.raises(UnknownName, match=r"unknown behaviour 'confuse'\. Did you mean 'confusion'"):
        make_method("surface-logic-kv", {"behaviour": "confuse"})
    with pytest.raises(UnknownName, match="unknown use 'all'"):
        make_method("surface-logic-kv", {"use": "all"})


def test_retrieval_heads_keep_all_and_the_others_the_ends() -> None:
    known = random_profile(zoo.model("llama"))
    order = sorted(((float(x), i, h) for i, t in known.tensors.items() for h, x in enumerate(t["heads_full"])))[::-1]
    cache = filled("duo-attention", 24, sinks=2, window=4, calibration=known)
    kept = held(cache)  # 144 slots: 6 in each of 6 heads, two of 60, and none left of the rest
    assert [kept[i][h] for _, i, h in order] == [60, 60, 6, 6, 6, 6]
    for _, i, h in order[2:]:
        assert set(cache.kept_positions(i)[0, h].tolist()) - {-1} == {0, 1, 56, 57, 58, 59}


def test_lazy_layers_keep_the_ends() -> None:
    """The order of layers is that of the last query's attention beyond the ends, by the model's own weights."""
    model, ids = zoo.model("llama"), torch.randint(3, zoo.VOCAB, (1, 60), generator=torch.Generator().manual_seed(0))
    cache = filled("simlayerkv", 24, sinks=2, window=4)
    kept = held(cache)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        every = eager(ids, output_attentions=True).attentions
    away = [float(x[0, :, -1, 2:-4].sum(-1).mean()) for x in every]
    first = max(range(3), key=lambda i: away[i])
    assert kept[first] == [60, 60]  # 144 slots: 36 at the ends, 108 beyond, which one layer of 2 heads takes
    assert sorted(map(tuple, kept)) == [(6, 6), (6, 6), (60, 60)]


def test_layers_keep_their_shares() -> None:
    cache = filled("per-layer", 20, shares=[2, 1, 1], sinks=2, window=4)
    assert held(cache) == [[30, 30], [15, 15], [15, 15]]
    with pytest.raises(KeepKVError, match="shares of 2 layers, and 3 are compressed"):
        filled("per-layer", 20, shares=[2, 1], sinks=2, window=4)
    with pytest.raises(KeepKVError, match="shares='2,1' is not"):
        make_method("per-layer", {"shares": "2,1"})


@dataclass(frozen=True)
class Old(AdaKV):
    """Layers share, by a signature that knows no calibration."""

    joint: ClassVar[bool] = True

    def across(self, scores: list[Tensor], tiers: list[Tensor], budgets: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
        return super().across(scores, tiers, budgets)


@dataclass(frozen=True)
class Listening(HeadBudget):
    """Remembers what it was told."""

    heard: ClassVar[list[Any]] = []

    def across(self, *given: Any) -> list[Tensor]:  # type: ignore[override]
        self.heard.append(given[3])
        return super().across(*given)


def test_an_allocation_is_told_what_it_asks_for() -> None:
    """The calibration of each layer, in the order of scores; one that asks for none is called as it always was."""
    model, ids = zoo.model("llama"), torch.randint(3, zoo.VOCAB, (1, 60))
    known = random_profile(model)
    score = make_method("snapkv", {"window": 4}).score
    for allocate, given in ((Old(), None), (Listening(), known)):
        cache = keepkv.Cache(model, keepkv.Method(score, allocate, window=4, name="mine"), 20, calibration=given)
        with torch.no_grad():
            model(ids, **{CACHE: cache})
        assert sum(map(sum, held(cache))) == 6 * 20
    [heard] = Listening.heard
    assert all(torch.equal(x["heads_inf"], known.tensors[i]["heads_inf"]) for i, x in enumerate(heard))


def test_servers_without_calibrations_refuse() -> None:
    with pytest.raises(
        KeepKVError, match=r"'headkv' needs a calibration 'heads' of this model, and this server was started"
    ):
        check_method(make_method("headkv", {}))
    check_method(make_method("simlayerkv", {}))


def test_every_calibration_that_an_allocation_needs_can_be_made() -> None:
    assert {ALLOCATIONS.build(name).needs_calibration for name in ALLOCATIONS} - {None} <= set(KINDS)


def test_a_profile_that_is_not_there_or_says_nothing_is_refused_at_once() -> None:
    """Before, when the first compression came, and a profile of zeros filled the first layers."""
    model, known = zoo.model("llama"), random_profile(zoo.model("llama"))
    names = next(iter(known.tensors.values()))
    without = [n for n in names if "full" not in n and "curve" not in n]
    lacking = {i: {n: held[n] for n in without} for i, held in known.tensors.items()}
    zeros = {i: {n: held[n] * ("compose" not in n) for n in names} for i, held in known.tensors.items()}
    for method, said in (("duo-attention", "no profile 'full'"), ("lukv", "no profile 'curve'")):
        with pytest.raises(CalibrationError, match=said):
            keepkv.Cache(model, method, 99, calibration=keepkv.Calibration("heads", lacking, known.fingerprint, {}))
    zero = keepkv.Calibration("heads", zeros, known.fingerprint, {})
    keepkv.Cache(model, "headkv", 99, calibration=zero)  # it reads another one
    with pytest.raises(CalibrationError, match="'compose' of the calibration 'heads' is 0 in every head"):
        keepkv.Cache(model, "headkv", 99, profile="compose", calibration=zero)
