"""Attention of one new token per row over slots in a few bits, which are never expanded all at once."""

from __future__ import annotations

from torch import Tensor

from keepkv.kernels.codes import Codes
from keepkv.kernels.decode.reference import Decoded
from keepkv.kernels.dispatch import CPU, by_cpp, check
from keepkv.kernels.logits import KeySlots
from keepkv.kernels.native import decode as cpp
from keepkv.kernels.packed import reference
from keepkv.kernels.segments import segments_of

__all__ = ["decode_packed"]


def decode_packed(
    query: Tensor,
    keys: Codes,
    values: Codes,
    log_votes: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    scaling: float,
    offsets: Tensor | None = None,
    lengths: Tensor | None = None,
    longest: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    weights: bool = False,
    backend: str | None = None,
) -> Decoded:
    """``decode_attention`` of a query (B,Hq,D) over keys of width D and values of width Dv that lie in codes.

    Codes of keys and values may differ in bits, groups and all else. Slots are rectangles (B,H,S,·), or ragged (N,·)
    with offsets and lengths; everything beyond keys and values is as there. A turn of the keys meets the query, one of
    the values the output, so none is applied to slots. The content of empty slots, if only their codes are bytes, does
    not matter. Raises ``UnsupportedInput`` where shapes do not fit together.
    """
    check(backend in (None, "auto", CPU, "reference"), f"backend {backend!r}: plain torch and C++ serve codes so far")
    keys.check("keys")
    values.check("values")
    segments = segments_of(keys.codes, offsets, lengths, longest)
    slots = KeySlots(keys.codes, log_votes, positions, segments, scaling, softcap, sinks)
    slots.check(query, keys.width, values=values.codes[..., 0])
    compute = reference.decode_packed
    if by_cpp(backend, lambda: cpp.obstacle(query, keys, values)):
        compute = cpp.decode_attention
    turned = keys.turned(query)
    decoded = compute(turned, slots, keys._replace(turn=None), values._replace(turn=None), weights)
    return decoded._replace(output=values.turn_back(decoded.output).to(query.dtype))
