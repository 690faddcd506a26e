"""Rotary positions of a stream that goes on forever: slots move together before a model's limit is reached."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.core.rope import AXES
from keepkv.core.tokens import Tokens
from keepkv.engine.cache import Cache
from keepkv.engine.relocate import relocate, times_of
from keepkv.errors import KeepKVError

MODES = ("auto", "absolute", "rerank", "time_compact")


def mode_of(positions: str, axes: int) -> str:
    """The mode that "auto" stands for, or ``positions`` where that fits; raises ``KeepKVError`` where it does not."""
    if positions not in MODES:
        raise KeepKVError(f"positions={positions!r}: give one of {', '.join(map(repr, MODES))}")
    if positions == "rerank" and axes == AXES:
        raise KeepKVError(
            "positions='rerank' gives a token one number on all axes, and this model tells the cells of a frame by "
            "theirs: use 'time_compact', which moves time alone"
        )
    if positions == "time_compact" and axes != AXES:
        raise KeepKVError(
            "positions='time_compact' moves the time of M-RoPE; this model has one position: use 'rerank'"
        )
    return ("time_compact" if axes == AXES else "rerank") if positions == "auto" else positions


def compact(cache: Cache, prefix: int, ticks: int) -> int:
    """Move all slots behind the first ``prefix`` tokens together; returns the position in time of what comes next.

    With M-RoPE a slot stands ``ticks`` before the next distinct time that its head holds, the newest at the same edge
    in every head and layer, since what comes has one position in all; cells stay. Else at its rank, which heads share.
    """
    found = [(layer, *times_of(layer)) for layer in cache.compressible if layer.is_initialized]
    if cache.shared.positions.axes < AXES:
        for layer, times, _, positions in found:
            valid = positions >= 0
            relocate(layer, ((valid.cumsum(-1) - 1) - times).masked_fill(~valid, 0))
        return max((int((positions >= 0).sum(-1).max()) for *_, positions in found), default=prefix)
    ranked = [_ranked(times, positions >= prefix) for _, times, _, positions in found]
    edge = prefix + ticks * max((int(count.max()) for _, count in ranked), default=0)
    for (layer, times, _, positions), (rank, count) in zip(found, ranked, strict=True):
        new = edge - ticks * (count[..., None] - rank)
        relocate(layer, (new - times).masked_fill(positions < prefix, 0))
    return edge


def _ranked(times: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Of each of ``times`` (B,H,S), which ascend, how many distinct ones of its head are before it ``among`` some; and
    how many there are, (B,H)."""
    last = torch.iinfo(torch.int64).min
    before = torch.where(among, times, last).cummax(-1).values
    new = among & (times > torch.nn.functional.pad(before[..., :-1], (1, 0), value=last))
    return new.cumsum(-1) - 1, new.sum(-1)


def forget(cache: Cache) -> None:
    """Facts of tokens that no layer holds are forgotten: they would grow with the stream."""
    held = [layer.store.view().positions.flatten(1) for layer in cache.compressible if layer.is_initialized]
    if held:
        cache.shared.positions.keep(torch.cat(held, dim=1).long())


def steps_held(known: Tokens | None, positions: Tensor) -> dict[int, int]:
    """How many slots at ``positions`` (B,H,S) each time step has."""
    if known is None:
        return {}
    facts = known.of(positions)
    vision = (positions >= 0) & (facts[..., -3] != 0)
    steps, counts = facts[..., -2][vision].unique(return_counts=True)
    return dict(zip(steps.tolist(), counts.tolist(), strict=True))
