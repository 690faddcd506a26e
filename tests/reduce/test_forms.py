"""Sums over groups, votes as counts, and the edges of the slot forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from merge_views import keep_every, make_view
from torch import Tensor

from keepkv.core.slots import LayerView, Slots
from keepkv.errors import KeepKVError
from keepkv.kernels.groups import expand_groups, group_logsumexp
from keepkv.observe import attention
from keepkv.reduce.base import Reduced
from keepkv.reduce.cam import CaM
from keepkv.reduce.d2o import D2O
from keepkv.reduce.forms import integer_votes
from keepkv.reduce.merge import KeepKV
from keepkv.score.content.random import Random
from keepkv.score.queries.ema import Ema

torch.set_num_threads(1)
F64 = torch.float64


def run(reduce: KeepKV, view: LayerView, keep: Tensor) -> Reduced:
    return reduce(view, keep, keep.float(), Random())


def test_segments_agree_with_loops() -> None:
    rng = torch.Generator().manual_seed(0)
    x = 300 * torch.randn(2, 3, 50, generator=rng, dtype=F64)
    group = torch.randint(0, 8, (2, 3, 50), generator=rng)  # 7 is in no group
    got = group_logsumexp(x, group, 7)
    for b in range(2):
        for h in range(3):
            for j in range(7):
                want = x[b, h][group[b, h] == j].logsumexp(0)
                assert got[b, h, j] == want or abs(got[b, h, j] - want) <= 1e-12 * abs(want)
    assert (expand_groups(got, group, fill=9.0)[group == 7] == 9).all()


def test_12_integer_votes_survive_many_merges_in_float32() -> None:
    held = torch.zeros(1, 1, 1)
    for _ in range(3000):
        held = integer_votes(torch.cat((held, torch.tensor([1.0, 3.0, 7.0]).log().view(1, 1, 3)), -1),
                             torch.zeros(1, 1, 4, dtype=torch.long), 1)  # fmt: skip
    assert round(float(held.double().exp())) == 33_001


def test_15_gqa_mean_mass_is_kept() -> None:
    """What the reduction keeps under GQA: the mean over query heads and queries of the group's normalised mass."""
    view = make_view(6, heads=2, groups=4, slots=30, queries=5, votes=True)
    keep = keep_every(view, 3) & (view.slots.positions < 25)
    for key in ("fixed", "bias"):
        slots = run(KeepKV(key, window=1, threshold=None), view, keep).slots
        last, at = view.queries[:, :, -1:], view.query_positions[:, -1:]
        before = attention.weights(view, last, at).mean((2, 3))
        u = attention.logits(replace(view, slots=slots), last, at)
        z = attention.log_normalizer(view, attention.logits(view, last, at))
        after = (u - z[..., None]).exp().mean((2, 3))
        assert (before.sum(-1) - after.sum(-1)).abs().max() <= 1e-12


def test_zip_gives_up_where_the_mean_logit_vanishes() -> None:
    view = make_view(17, heads=1, slots=8)
    view.queries.zero_()
    keep = keep_every(view, 4)
    result = run(KeepKV("zip", threshold=None, window=1), view, keep)
    assert result.merged.sum() == 0 and result.dropped.sum() == 6
    assert torch.equal(result.slots.keys, view.slots.select(keep).keys)


def test_zip_gives_up_where_the_scaled_key_leaves_the_range_of_the_cache() -> None:
    """ℓ ≈ ±1 with votes 1 and e²: ℓ̄ ≈ 2e-4 but ℓ* = −0.43, so the scale is of order 1000: no float16."""
    keys = torch.tensor([[1.0, 100.0], [-1.0 + 2**-5, 100.0]], dtype=torch.float16).view(1, 1, 2, 2)
    votes, positions = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[0, 1]]], dtype=torch.int32)
    query = torch.tensor([math.sqrt(2), 0.0]).view(1, 1, 1, 2)
    view = LayerView(Slots(keys, keys, votes, positions), query, torch.tensor([[1]]), torch.tensor([2]), 2**-0.5)
    keep = torch.tensor([[[True, False]]])
    result = run(KeepKV("zip", threshold=None, window=1), view, keep)
    assert result.merged.sum() == 0 and torch.equal(result.slots.keys, keys[:, :, :1])
    double = replace(view, slots=view.slots.with_(keys=keys.double(), values=keys.double()), queries=query.double())
    result = run(KeepKV("zip", threshold=None, window=1), double, keep)
    assert result.merged.sum() == 1 and result.slots.keys.abs().max() > 65504


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepKV("mean"), lambda: KeepKV(threshold="all"), lambda: KeepKV(alpha=0.0), lambda: KeepKV(window=0),
        lambda: CaM(span=0), lambda: D2O(weights="none"), lambda: D2O(beta=2.0), lambda: Ema(alpha=1.0),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(KeepKVError):
        make()
