"""What pieces return is looked at once, where it is taken over: a piece that is wrong is named, with what it returned.

Shapes, types and devices cost nothing to look at. Whether a score holds NaN is asked of the device, once for each layer
and compression; tokens that are decoded without a compression are not scored, and cost nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from keepkv.core.options import shown
from keepkv.core.slots import LayerView, Slots
from keepkv.errors import KeepKVError
from keepkv.reduce.base import Reduced
from keepkv.score.base import Score, name_of


class WrongResult(KeepKVError, TypeError):
    """A score, an allocation or a reduction returned something else than it must."""


def checked_scores(score: Score, view: LayerView, found: Any, what: str = "returned") -> Tensor:
    """``found``, which ``score`` returned for ``view``; raises ``WrongResult`` unless it is (B,H,S) float32 and no NaN.

    A row whose own keys, values or statistics are not finite may have NaN: there the model is broken, not the score. So
    may one that fits its budget: it keeps everything.
    """
    slots = view.slots
    name = f"score {name_of(score)!r}"
    scores = _tensor(name, what, found, slots.shape, "(B,H,S)", torch.float32, slots.positions.device)
    wrong = scores.isnan()
    if (
        bool(wrong.any())
        and bool((wrong := wrong & slots.valid).any())
        and bool((rows := wrong.flatten(1).any(1) & _sound(view)).any())
    ):
        count = int(wrong[rows].sum())
        raise WrongResult(
            f"{name} {what} NaN for {count} of {int(slots.valid[rows].sum())} slots, whose keys and values are finite: "
            "expected a number for each (a division by zero, or the logarithm of a negative number?)"
        )
    return scores


def checked_token_stats(score: Score, found: Any, keys: Tensor) -> dict[str, Tensor]:
    """``found``, the statistics that ``score`` returned for new tokens with ``keys`` (B,H,T,D); raises ``WrongResult``
    unless they are among those that it declares, and (B,H,T) float32."""
    name = f"score {name_of(score)!r}"
    if not isinstance(found, dict) or not found.keys() <= score.stats.keys():
        raise WrongResult(f"{name} returned {shown(found)} of new tokens: expected some of {', '.join(score.stats)}")
    shape = tuple(keys.shape[:3])
    return {
        stat: _tensor(name, f"returned {stat!r} of new tokens:", x, shape, "(B,H,T)", torch.float32, keys.device)
        for stat, x in found.items()
    }


def checked_counts(allocate: object, scores: Tensor, found: Any) -> Tensor:
    """``found``, the counts that an allocation returned for ``scores`` (B,H,S); raises ``WrongResult`` unless it is
    (B,H) int64."""
    name = f"allocation {type(allocate).__name__!r}"
    return _tensor(name, "returned", found, tuple(scores.shape[:2]), "(B,H)", torch.int64, scores.device)


def checked_reduced(reduce: object, slots: Slots, found: Any) -> Reduced:
    """``found``, what a reduction made of ``slots``; raises ``WrongResult`` unless it is a ``Reduced`` of like rows."""
    name = f"reduction {type(reduce).__name__!r}"
    if not isinstance(found, Reduced):
        raise WrongResult(f"{name} returned {shown(found)}: expected a keepkv.Reduced")
    device, (rows, heads, _) = slots.positions.device, slots.shape
    for field in ("merged", "dropped"):
        _tensor(name, f"returned {field}:", getattr(found, field), (rows, heads), "(B,H)", torch.int64, device)
    _tensor(name, "returned lost:", found.lost, slots.shape, "(B,H,S)", torch.bool, device)
    kept = found.slots.shape
    wide = (*kept, slots.keys.shape[-1])
    _tensor(name, "returned slots.keys:", found.slots.keys, wide, "(B,H,S,D)", slots.keys.dtype, device)
    if kept[:2] != (rows, heads):
        raise WrongResult(f"{name} returned slots of {kept[:2]} rows and heads: expected (B,H) = {(rows, heads)}")
    return found


def _tensor(
    name: str, what: str, found: Any, shape: tuple[int, ...], letters: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    expected = f"{letters} = {shape} {str(dtype).removeprefix('torch.')} on {device}"
    if not isinstance(found, Tensor):
        raise WrongResult(f"{name} {what} {shown(found)}: expected a tensor {expected}")
    fits = found.dtype == dtype or (dtype == torch.float32 and found.dtype == torch.float64)  # of models in float64
    if found.shape != shape or not fits or found.device != device:
        given = f"{tuple(found.shape)} {str(found.dtype).removeprefix('torch.')} on {found.device}"
        raise WrongResult(f"{name} {what} {given}: expected {expected}")
    return found


def _sound(view: LayerView) -> Tensor:
    """(B,) bool: rows over their budget in which everything that a score sees is finite."""
    slots = view.slots
    over = slots.lengths.amax(1) > view.budget if view.budget is not None else slots.valid.any(2).any(1)
    seen = [x.isfinite() | ~slots.valid[..., None] for x in (slots.keys, slots.values)]
    seen += [~x.isnan() for x in (*slots.stats.values(), *view.state.values(), view.queries)]
    return torch.stack([over, *(x.reshape(len(over), -1).all(1).to(over.device) for x in seen)]).all(0)
