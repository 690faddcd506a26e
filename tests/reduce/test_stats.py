"""Statistics of slots that merge, by their kind: against loops, and for each score what its own means."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from merge_views import make_view

import keepkv
from keepkv.errors import KeepKVError
from keepkv.reduce.base import Reduce
from keepkv.reduce.merge import KeepKV
from keepkv.reduce.residual import Residual
from keepkv.score.base import SCORES

STATISTICS = [("kvzip", "reread", 0.0), ("g-kv", "global_score", -1.0), ("compactor", "block_attention", -1.0)]


@pytest.mark.parametrize("reduce", [KeepKV(threshold=None), Residual(1.0)], ids=["merge", "residual"])
@pytest.mark.parametrize(("name", "stat", "never"), STATISTICS)
def test_a_peak_stays_the_peak_and_nothing_known_stays_unknown(
    name: str, stat: str, never: float, reduce: Reduce
) -> None:
    """A maximum does not add up, and −1, which says that nothing is known, is no amount."""
    view, score = make_view(3, heads=2, slots=12, queries=4), SCORES.build(name)
    held = torch.rand(1, 2, 12, dtype=torch.float64)
    held[:, :, ::2] = never
    held[:, 1] = never
    view.slots.stats[stat] = held
    keep = torch.zeros(1, 2, 12, dtype=torch.bool)
    keep[..., 6] = True  # the only one, unknown itself: everything enters it
    found = reduce(view, keep, view.slots.log_votes, score)
    assert (found.merged == 11).all()
    assert torch.equal(found.slots.stats[stat][0, :, 0], held[0].amax(-1)) and float(held[0, 1].max()) == never


@pytest.mark.parametrize("kind", ["sum", "logsumexp", "max"])
def test_each_kind_equals_a_loop(kind: Any) -> None:
    from keepkv.reduce.stats import combined

    rng = torch.Generator().manual_seed(1)
    x = 300 * torch.randn(2, 3, 40, generator=rng, dtype=torch.float64)
    group = torch.randint(0, 8, (2, 3, 40), generator=rng)  # 7: in no group
    group[group == 4] = 3  # an empty group
    got = combined(x, group, 7, kind)
    for b, h, g in ((b, h, g) for b in range(2) for h in range(3) for g in range(7)):
        members = [float(v) for v, to in zip(x[b, h], group[b, h], strict=True) if int(to) == g]
        if not members:
            assert got[b, h, g] == (0.0 if kind == "sum" else -torch.inf)
            continue
        one = torch.tensor(members, dtype=torch.float64)
        wanted = {"sum": sum(members), "logsumexp": float(one.logsumexp(0)), "max": max(members)}[kind]
        assert float(got[b, h, g]) == pytest.approx(wanted, rel=1e-12)


def test_statistics_must_say_how_they_merge() -> None:
    with pytest.raises(KeepKVError, match="supported are 'sum', 'logsumexp', 'max', 'anchor'"):
        keepkv.Stat(0.0, merge="mean")  # type: ignore[arg-type]
    with pytest.raises(KeepKVError, match=r"Old.stats\['mass'\] is 0.0: give a keepkv.Stat"):

        class Old(keepkv.Score):
            stats: ClassVar[dict[str, Any]] = {"mass": 0.0}
