"""Slots that attention may choose from: looked at a tile at a time, and taken without reading the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from keepkv.attention.part import TILE_BYTES, Part, plain
from keepkv.core.slots import EMPTY
from keepkv.kernels.codes import Codes
from keepkv.kernels.logits import MASKED, cap_logits
from keepkv.store.codec.base import Codec, Fields


class Reader(Protocol):
    """What reads fields: the content of a store."""

    @property
    def codec(self) -> Codec: ...

    @property
    def exact(self) -> bool: ...

    @property
    def shared(self) -> Fields: ...

    def read(self, fields: Fields) -> tuple[Tensor, Tensor]: ...

    def glance(self, fields: Fields) -> Tensor | Codes: ...


class Zone(NamedTuple):
    """Some of the slots: ``tile(start, stop)`` and ``at(columns (B,H,K))`` return their fields as rectangles."""

    length: int
    tile: Callable[[int, int], Fields]
    at: Callable[[Tensor], Fields]


@dataclass
class Older:
    """The slots (B,H,S) of a layer but the newest, which ``newest`` has as parts. Empty ones may lie anywhere."""

    content: Reader
    zones: list[Zone]
    newest: list[Part]

    @property
    def length(self) -> int:
        """S."""
        return sum(zone.length for zone in self.zones)

    @cached_property
    def positions(self) -> Tensor:
        """(B,H,S) int32, ``EMPTY`` where there is no slot."""
        return torch.cat([zone.tile(0, zone.length)["positions"] for zone in self.zones], 2)

    def keys(self, glance: bool = False) -> Iterator[Tensor | Codes]:
        """Keys (B,H,s,D) as attention reads them, a tile at a time. glance: as the codec's ``glance`` has them."""
        one = self.newest[0]
        width = plain(one)[0].shape[-1] * one.positions.shape[:2].numel() * 4
        step = max(1, TILE_BYTES // width)
        for zone in self.zones:
            for start in range(0, zone.length, step):
                fields = zone.tile(start, min(zone.length, start + step))
                yield self.content.glance(fields) if glance else self.content.read(fields)[0]

    def logits(self, query: Tensor, scaling: float, softcap: float | None, glance: bool = False) -> Tensor:
        """Logits (B,H,G,S), float32 or wider, of one query (B,Hq,D) after RoPE, votes among them; ``MASKED`` where a
        slot is empty."""
        (b, h), wide = self.positions.shape[:2], torch.promote_types(query.dtype, torch.float32)
        grouped, found = (query.to(wide) * scaling).view(b, h, -1, query.shape[-1]), []
        for keys in self.keys(glance):
            if isinstance(keys, Codes):
                found.append(keys.turned(grouped) @ keys._replace(turn=None).expand(wide).mT)
            else:
                found.append(grouped @ keys.to(wide).mT)
        return cap_logits(torch.cat(found, -1), softcap) + self.bias[:, :, None]

    @cached_property
    def bias(self) -> Tensor:
        """What is added to the logits, (B,H,S) float32: log votes, ``MASKED`` for empty slots."""
        votes = []
        for zone in self.zones:
            fields = zone.tile(0, zone.length)
            zeros = torch.zeros(fields["positions"].shape, device=fields["positions"].device)
            votes.append(fields.get("log_votes", zeros))
        return torch.cat(votes, 2).masked_fill(self.positions < 0, MASKED)

    def take(self, columns: Tensor, inside: Tensor) -> Part:
        """The slots at ``columns`` (B,H,K) as they lie, in codes where they are; empty where not ``inside`` (B,H,K)."""
        start = 0
        fields: Fields = {}
        for zone in self.zones:
            local = columns - start
            mine = (local >= 0) & (local < zone.length)
            taken = zone.at(local.clamp(0, zone.length - 1))
            fields = _either(mine, taken, fields) if fields else taken
            start += zone.length
        positions, votes = fields["positions"].masked_fill(~inside, EMPTY), fields.get("log_votes")
        packed = None if self.content.exact else self.content.codec.packed(fields)
        if packed is not None:
            like, shift = self.content.codec.like(fields), self.content.codec.shift(self.content.shared)
            return Part(*packed, votes, positions, like=like, shift=shift)
        return Part(*self.content.read(fields), votes, positions)


def _either(which: Tensor, one: Fields, other: Fields) -> Fields:
    """Fields ``one`` where ``which`` (B,H,K), else ``other``; zeros for a field that is lacking."""
    joined = {}
    for name in one.keys() | other.keys():
        like = one.get(name, other.get(name))
        assert like is not None
        here = which[:, : like.shape[1]]
        a, b = one.get(name, torch.zeros_like(like)), other.get(name, torch.zeros_like(like))
        joined[name] = torch.where(here if like.dim() == 3 else here[..., None], a, b)
    return joined
