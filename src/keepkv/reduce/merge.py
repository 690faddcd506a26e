"""KeepKV: merge what leaves into what stays, and keep the attention mass it had (arXiv 2504.09936)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Cosine, Rate, Window, one_of
from keepkv.core.slots import LayerView, Slots
from keepkv.errors import CacheStateError
from keepkv.kernels.assign import nearest_key
from keepkv.kernels.groups import expand_groups, group_logsumexp, group_sum
from keepkv.kernels.merge import merge_groups
from keepkv.observe.masses import exact_dtype, log_masses, log_masses_of, recent
from keepkv.reduce.base import Reduce, Reduced, register_reduce
from keepkv.reduce.drop import Drop
from keepkv.reduce.forms import Groups, groups, integer_votes, zip_scale
from keepkv.reduce.stats import merged_stats
from keepkv.score.base import Score

FORMS = ("fixed", "bias", "zip", "code")


@register_reduce("keepkv")
@dataclass(frozen=True)
class KeepKV(Reduce):
    """Each leaving slot enters the kept, unprotected slot of largest key cosine in its head, if there is one.

    key: the form of a merged slot, see ``reduce.forms``. ``"fixed"``, the default, leaves the kept key in place and
        gives it the mass of its group: b_r = b_c + ln(Σ_𝒢 m_i / m_c), m_i the mean mass of ``score.masses``.
        ``"bias"`` moves the key to the weighted mean and matches the mass in the same way, from the key as it was
        rounded to the cache dtype. ``"zip"`` is the paper as written: scaled mean key, integer votes, raw scores.
        ``"code"`` is what its released code does: mean key, integer votes.
    threshold: merge only where the cosine is greater, 0.8 in the paper and its code; what stays below is dropped with
        its mass. ``None``: merge all, which lowers the output error and loses what was worth keeping: at small
        budgets each kept slot then speaks for dozens of others.
    coverage: merge only the leaving slots of largest mass that together hold this share of the mass that leaves; the
        rest is dropped. Most leaving slots hold next to nothing, and finding where they belong costs as much.
    alpha, window: the last ``window`` queries of the row, with weights ∝ alpha^age, predict the masses. Neither is
        given in the paper. ``window=1``: the last query alone; there every form but ``code`` is exact. The ``fixed``
        form takes the masses that the score predicts, where it does.

    GQA: one slot serves G query heads. Masses are averaged over them (normalised attention; raw scores for ``zip``),
    so that the mean mass over the group of heads is kept, not that of each head.
    Softcap: logits and masses are taken after the cap, and merged keys are matched through it, so exactness holds;
    only the property of ``bias`` never to exceed the true mass is lost.
    """

    key: Annotated[str, one_of(*FORMS)] = "fixed"
    threshold: Cosine | None = 0.8
    alpha: Rate = 0.9
    window: Window = 32
    coverage: Rate = 1.0

    merges: ClassVar[bool] = True

    def __call__(self, view: LayerView, keep: Tensor, scores: Tensor, score: Score) -> Reduced:
        slots = view.slots
        keep = keep & slots.valid
        leaving = slots.valid & ~keep
        predicted = score.masses(view) if self.key == "fixed" else None
        worth = leaving
        if self.coverage < 1:
            u = predicted if predicted is not None else log_masses(view, recent(view, self.window, self.alpha))[0]
            worth = heaviest(u, leaving, self.coverage)
        into, cosine = nearest_key(slots.keys, worth, keep if view.protected is None else keep & ~view.protected)
        merged = into >= 0 if self.threshold is None else (into >= 0) & (cosine > self.threshold)
        if not bool(merged.any()):
            return Drop()(view, keep, scores, score)
        kept = slots.select(keep)
        size = kept.positions.shape[-1]
        # The column that each kept slot has in `kept`, whose empty slots come first.
        column = keep.cumsum(-1) - 1 + size - keep.sum(-1, keepdim=True)
        own = torch.where(keep, column, size)
        group = torch.where(merged, column.gather(2, into.clamp(min=0)), own)
        keys, values, log_votes, merges = self._merge(view, kept, group, own, merged, predicted)
        merged = merged & expand_groups(merges.to(torch.int8), group).bool()
        group = torch.where(merged, group, own)
        stats = merged_stats(score, slots, kept, group, merges)
        result = Slots(keys, values, log_votes, kept.positions, stats)
        lost = leaving & ~merged
        return Reduced(result, merged.sum(-1), lost.sum(-1), lost)

    def _merge(
        self, view: LayerView, kept: Slots, group: Tensor, own: Tensor, merged: Tensor, predicted: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values, log_votes of the kept slots after merging, and which of them (B,H,K) took something in."""
        size = kept.positions.shape[-1]
        if predicted is not None:
            u = predicted.to(exact_dtype(view.slots.keys))
        else:
            past = recent(view, self.window, self.alpha)
            if bool((merged.flatten(1).any(-1) & past.empty).any()):
                raise CacheStateError("keepkv: a row has slots to merge but none of its queries is known")
            u, log_z = log_masses(view, past, raw=self.key == "zip")
        joined = merge_groups(u, None if self.key == "fixed" else view.slots.keys, view.slots.values, group, size)
        merges = group_sum(merged.to(torch.int32), group, size) > 0
        if joined.keys is None:
            keys, bias = kept.keys, kept.log_votes + (joined.log_mass - group_logsumexp(u, own, size))
        else:
            g = groups(u, view.slots.log_votes, group, size)
            keys, bias, merges = self._moved(view, kept, joined.keys, g, merges)
            if self.key == "bias":
                bias = joined.log_mass - log_masses_of(view, past, log_z, keys, kept.positions)
        values = torch.where(merges[..., None], joined.values.to(kept.values.dtype), kept.values)
        # The engine keeps biases in float32: a bf16 bias would cost as much as rounding the keys.
        log_votes = kept.log_votes.to(exact_dtype(kept.keys))
        return keys, values, torch.where(merges, bias.to(log_votes.dtype), log_votes), merges

    def _moved(
        self, view: LayerView, kept: Slots, mean: Tensor, g: Groups, merges: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys as moved, in the cache dtype, integer votes, and which slots merge at all: ``zip`` cannot always."""
        moved = mean
        if self.key == "zip":
            scale, exists = zip_scale(g, view.softcap)
            moved = moved * scale[..., None]
            # A scale near a vanishing mean logit can leave the range of the cache dtype.
            merges = merges & exists & moved.to(kept.keys.dtype).isfinite().all(-1)
        votes = integer_votes(view.slots.log_votes, g.group, g.size)
        return torch.where(merges[..., None], moved.to(kept.keys.dtype), kept.keys), votes, merges


def heaviest(u: Tensor, among: Tensor, share: float) -> Tensor:
    """(B,H,S) bool: the fewest slots of ``among`` whose masses e^u together reach ``share`` of those of all of them."""
    mass, order = u.masked_fill(~among, float("-inf")).softmax(-1).nan_to_num_(0.0).sort(dim=-1, descending=True)
    before = mass.cumsum(-1) - mass
    return torch.zeros_like(among).scatter_(-1, order, (before < share) & (mass > 0)) & among
