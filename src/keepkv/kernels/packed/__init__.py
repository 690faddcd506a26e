"""Attention of one new token per row over slots in a few bits, which are never expanded all at once."""

from __future__ import annotations

from torch import Tensor

from keepkv.kernels.codes import Codes
from keepkv.kernels.decode.reference import Decoded
from keepkv.kernels.dispatch import MAX_HEAD_DIM, by_cpp, choose
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
    keys.check("keys")
    values.check("values")
    segments = segments_of(keys.codes, offsets, lengths, longest)
    slots = KeySlots(keys.codes, log_votes, positions, segments, scaling, softcap, sinks)
    slots.check(query, keys.width, values=values.codes[..., 0])
    turned, unturned = keys.turned(query), (keys._replace(turn=None), values._replace(turn=None))
    beside = (keys.codes, keys.scale, values.codes, values.scale)
    if by_cpp(backend, lambda: cpp.obstacle(query, keys, values)):
        decoded = cpp.decode_attention(turned, slots, *unturned, weights)
    elif choose(backend, query, beside=beside, obstacle=_obstacle(keys) or _obstacle(values)) == "reference":
        decoded = reference.decode_packed(turned, slots, *unturned, weights)
    else:
        from keepkv.kernels.packed import triton  # only here, since Triton may be missing

        decoded = triton.decode_packed(turned.to(query.dtype), slots, *unturned, weights)
    return decoded._replace(output=values.turn_back(decoded.output).to(query.dtype))


def _obstacle(codes: Codes) -> str | None:
    """Why the kernel does not read ``codes``; None where it does."""
    group, word = codes.width // codes.scale.shape[-1], 32 // codes.bits
    if codes.width > MAX_HEAD_DIM:
        return f"they take head dimensions up to {MAX_HEAD_DIM}, not {codes.width}"
    if codes.width % word:
        return f"they read codes in words of 4 bytes, and {codes.width} numbers in {codes.bits} bits do not fill words"
    if group != codes.width and (group & (group - 1) or group % word):
        return f"in {codes.bits} bits they take groups of {word}, {2 * word}, {4 * word} … numbers, not of {group}"
    return None
