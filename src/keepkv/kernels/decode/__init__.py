"""Attention of one new token per row over its slots: the step that decoding repeats."""

from __future__ import annotations

from torch import Tensor

from keepkv.kernels.decode import reference
from keepkv.kernels.decode.reference import Decoded
from keepkv.kernels.dispatch import by_cpp, choose
from keepkv.kernels.logits import KeySlots
from keepkv.kernels.native import decode as cpp
from keepkv.kernels.segments import segments_of

__all__ = ["Decoded", "decode_attention"]


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
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
    """softmax(softcap(q·k·scaling) + log_votes) V for one query (B,Hq,D) per query head.

    keys (B,H,S,D), values (B,H,S,Dv), log_votes (B,H,S) float32 or None, positions (B,H,S) int or None: a slot with a
    position below 0 is empty, wherever it stands. With lengths (B,H): only the last ``lengths`` columns count. With
    offsets and lengths (B,H): ragged slots, keys (N,D) and so on, see ``segments_of``. Strides may be any, but the
    elements of a slot are copied unless they lie side by side. The query heads of a KV head are adjacent.

    sinks (Hq,): logit of an extra softmax entry without value. weights: return the attention weights too; keys are not
    read again for them. Softmax and sums are float32 (float64 for float64). backend: see ``dispatch.choose``. Raises
    ``UnsupportedInput`` where shapes do not fit together.
    """
    segments = segments_of(keys, offsets, lengths, longest)
    slots = KeySlots(keys, log_votes, positions, segments, scaling, softcap, sinks)
    slots.check(query, keys.shape[-1], values=values[..., 0])
    if by_cpp(backend, lambda: cpp.obstacle(query, keys, values)):
        decoded = cpp.decode_attention(query, slots, keys, values, weights)
        return decoded._replace(output=decoded.output.to(query.dtype))
    if choose(backend, query, keys, values) == "reference":
        return reference.decode_attention(query, slots, values, weights)
    from keepkv.kernels.decode import triton  # only here, since Triton may be missing

    return triton.decode_attention(query, slots, values, weights)
