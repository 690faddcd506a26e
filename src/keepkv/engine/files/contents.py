"""What the tensors of a cache file may hold, checked once they are read and before a cache has them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from keepkv.core.slots import EMPTY
from keepkv.core.tensorfile import all_finite
from keepkv.core.tokens import FAR, KIND, TEXT, VIDEO
from keepkv.engine.files.schema import MOST
from keepkv.engine.files.shapes import Zone, zones
from keepkv.store.base import Store

LARGEST = 1e12  # of any number: no key, value or query is larger, and products of such stay finite
LARGEST_VOTES = 700.0  # of their logarithm: its exponential stays finite


def numbers(name: str, x: Tensor, largest: float = LARGEST) -> None:
    """Raise ``ValueError`` where a tensor has numbers that are not finite, or beyond ``largest``."""
    if not all_finite(x):
        raise ValueError(f"tensor {name!r} has numbers that are not finite")
    if x.is_floating_point() and x.numel() and x.itemsize > 1:
        low, high = x.aminmax()
        if max(-float(low), float(high)) > largest:
            raise ValueError(f"tensor {name!r} has numbers beyond {largest:g}")


def whole(name: str, x: Tensor, least: int, most: Tensor | int = MOST) -> None:
    """Raise ``ValueError`` where a tensor of whole numbers has some outside of its bounds."""
    if bool((x < least).any()) or bool((x > most).any()):
        raise ValueError(f"tensor {name!r} has numbers below {least} or above what is possible")


def truths(name: str, x: Tensor) -> None:
    """Raise ``ValueError`` where a tensor of bool has bytes that are neither."""
    if bool((x.view(torch.uint8) > 1).any()):
        raise ValueError(f"tensor {name!r} has bytes that are neither true nor false")


def positions(name: str, x: Tensor, seen: Tensor) -> None:
    """Raise ``ValueError`` where positions (B,…) are not of tokens that a row has ``seen`` (B,)."""
    whole(name, x, EMPTY, (seen - 1).view(-1, *[1] * (x.dim() - 1)))


def runs(prefix: str, at: Tensor, facts: Tensor, seen: Tensor) -> None:
    """Raise ``ValueError`` unless ``at`` (B,N) and ``facts`` (B,N,A+3) are ``Tokens`` of rows of ``seen`` (B,)."""
    real = at != FAR
    whole(f"{prefix}runs", at.masked_fill(~real, 0), 0, (seen - 1).clamp(min=0)[:, None])
    if at.shape[1] == 0 or bool((at[:, 1:] < at[:, :-1]).any()) or not bool(real[:, 0].all()):
        raise ValueError(f"tensor '{prefix}runs' is not in order")
    whole(f"{prefix}facts", facts, -1, MOST)
    whole(f"{prefix}facts", facts[..., KIND], TEXT, VIDEO)


def state(name: str, x: Tensor, columns: int, may_be_nan: bool) -> None:
    """Raise ``ValueError`` unless ``x`` is what a score may remember."""
    if x.is_floating_point():
        numbers(name, x.nan_to_num(0.0) if may_be_nan else x)
    elif x.dtype == torch.bool:
        truths(name, x)
    else:
        whole(name, x, EMPTY, columns)


def store(prefix: str, kind: Store, tensors: Mapping[str, Tensor], seen: Tensor, columns: int) -> None:
    """Raise ``ValueError`` unless ``tensors``, whose shapes are right, are what such a store may hold of rows that have
    ``seen`` (B,) tokens in so many ``columns``. prefix: of their names."""
    shared = {name[len("shared.") :]: x for name, x in tensors.items() if name.startswith("shared.")}
    for zone in zones(kind) or [Zone("", "unknown")]:
        mine = {name[len(zone.prefix) :]: x for name, x in tensors.items() if name.startswith(zone.prefix)}
        if "positions" in mine:
            _zone(prefix + zone.prefix, zone, kind, mine, shared, seen, columns)
    for name, x in tensors.items():
        if name == "appended":
            wide = sum(y.shape[2] for n, y in tensors.items() if n.endswith("positions") and y.dim() == 3)
            whole(prefix + name, x, 0, max(columns, wide))  # columns before the first token may have been forgotten
        if x.is_floating_point() and name.rpartition(".")[2] not in kind.held.stats:
            numbers(prefix + name, x, LARGEST_VOTES if name.endswith("log_votes") else LARGEST)
        elif x.is_floating_point():
            _statistic(prefix + name, x, kind.held.stats[name.rpartition(".")[2]])


def _zone(
    prefix: str, zone: Zone, kind: Store, mine: Mapping[str, Tensor], shared: dict[str, Tensor], seen: Tensor,
    columns: int,
) -> None:  # fmt: skip
    held = mine["positions"]
    if zone.form == "segments":
        lengths = mine["lengths"]
        whole(f"{prefix}lengths", lengths, 0, columns)
        if int(lengths.sum()) != len(held):
            raise ValueError(f"tensor '{prefix}lengths' has {int(lengths.sum())} slots, and there are {len(held)}")
        rows = torch.arange(len(seen)).repeat_interleave(lengths.sum(1))
        positions(f"{prefix}positions", held, seen[rows])
    elif zone.form != "unknown":
        positions(f"{prefix}positions", held, seen)
        counts = mine["cursor" if zone.form == "buffers" else "counts"]
        if len(counts) not in (1, 2) or (
            zone.prefix in ("", "growing.") and zone.form == "columns" and len(counts) != 2
        ):
            raise ValueError(f"tensor '{prefix}counts' has {len(counts)} numbers")
        whole(f"{prefix}counts", counts, 0, torch.tensor([held.shape[2], max(columns, held.shape[2])])[: len(counts)])
        if bool((held[:, :, int(counts[0]) :] != EMPTY).any()):
            raise ValueError(f"tensor '{prefix}positions' has tokens behind the {int(counts[0])} columns that are used")
    if zone.encoded:
        content = {name: x for name, x in mine.items() if name not in ("positions", "lengths", "counts", "log_votes")}
        kind.held.codec.check(content, shared)
        for name, x in zip(("keys", "values"), () if shared else kind.held.codec.decode(content), strict=False):
            numbers(f"{prefix}{name}", x)


def _statistic(name: str, x: Tensor, start: float) -> None:
    """A statistic may be what it starts with, where that is an infinity."""
    numbers(name, x if abs(start) < float("inf") else x.masked_fill(x == start, 0.0))
