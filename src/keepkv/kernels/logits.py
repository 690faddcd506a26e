"""Attention logits: what makes them of queries and keys, and what their softmax adds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.errors import UnsupportedInput
from keepkv.kernels.dispatch import check
from keepkv.kernels.segments import Segments

MASKED = -1e30  # logit of what is not seen: finite, so that a query that sees nothing yields no NaN


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """c·tanh(ℓ/c) with c = ``softcap``, the bound that some models put on attention logits; ℓ itself for None."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def with_sinks(lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Log-sum-exps (B,H,G,…) with the logit of one more softmax entry each, sinks (Hq,), if the model has them.

    −inf stays: a query that sees no slot attends to nothing.
    """
    if sinks is None:
        return lse
    sinks = sinks.to(lse.dtype).view(1, *lse.shape[1:3], *[1] * (lse.dim() - 3))
    return torch.where(lse.isneginf(), lse, torch.logaddexp(lse, sinks))


class KeySlots(NamedTuple):
    """The slots that queries meet, and what makes their logits: softcap(q·k·scaling) + log_votes.

    keys (B,H,S,D), or the bytes of packed ones; log_votes (B,H,S) float32 or None; positions (B,H,S) int or None, below
    0 where a slot is empty; for ragged slots (N,D), (N,) and (N,). sinks (Hq,) or None: see ``with_sinks``.
    """

    keys: Tensor
    log_votes: Tensor | None
    positions: Tensor | None
    segments: Segments
    scaling: float
    softcap: float | None
    sinks: Tensor | None

    def check(self, queries: Tensor, width: int, **fields: Tensor | None) -> None:
        """Raise ``UnsupportedInput`` unless queries (B,Hq,…,D), sinks, and fields with one number a slot fit.

        width: the dimension of a key.
        """
        b, heads, d = *queries.shape[:2], queries.shape[-1]
        rows, h, slots = self.segments.rows, self.segments.heads, list(self.keys.shape[:-1])
        check(
            b == rows and heads % h == 0 and d == width,
            f"queries of {b} rows, {heads} query heads, dimension {d}, for keys of {rows} rows, {h} heads, dimension "
            f"{width}: query heads must be a multiple of heads, the rest equal",
        )
        check(self.sinks is None or self.sinks.numel() == heads, f"{heads} query heads need as many sinks")
        for name, x in {**fields, "log_votes": self.log_votes, "positions": self.positions}.items():
            if x is not None and (got := list(x.shape)) != slots:
                raise UnsupportedInput(f"{name} for slots {got}, keys for slots {slots}: they must be the same")

    def logits(self, queries: Tensor, index: Tensor | None, inside: Tensor | None) -> Tensor:
        """Logits (B,H,R,longest) of queries (B,H,R,D), whether they see a slot or not; float32, or float64 for float64.

        R counts the queries of all query heads of a KV head. index, inside as ``Segments.index`` returns them.
        """
        wide = torch.promote_types(queries.dtype, torch.float32)
        keys = self.segments.take(self.keys, index, inside).to(wide)
        u = cap_logits(queries.to(wide) @ keys.transpose(-1, -2) * self.scaling, self.softcap)
        return u if self.log_votes is None else u + self.segments.take(self.log_votes, index, inside)[:, :, None]

    def held(self, index: Tensor | None, inside: Tensor | None) -> Tensor | None:
        """Positions (B,H,longest) of the slots, below 0 where there is none; None where every column holds one.

        Without positions of their own, slots are at 0.
        """
        if self.positions is None:
            return None if inside is None else inside.long() - 1
        held = self.segments.take(self.positions, index, inside)
        return held if inside is None else held.masked_fill_(~inside, -1)
