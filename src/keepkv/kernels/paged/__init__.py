"""Attention of one new token per row over slots that lie in the blocks of a serving engine."""

from __future__ import annotations

from torch import Tensor

from keepkv.kernels.decode.reference import Decoded
from keepkv.kernels.dispatch import check, choose
from keepkv.kernels.paged import reference
from keepkv.kernels.paged.slots import PagedSlots

__all__ = ["PagedSlots", "paged_attention"]


def paged_attention(
    query: Tensor,
    slots: PagedSlots,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Decoded:
    """softmax(softcap(q·k·scaling) + log_votes) V for one query (R,Hq,D) per query head, over the ``slots`` of its row.

    The query heads of a KV head are adjacent. sinks (Hq,): logit of an extra softmax entry without value. Softmax and
    sums are float32 (float64 for float64); weights are never returned. backend: see ``dispatch.choose``. Raises
    ``UnsupportedInput`` where shapes do not fit together.
    """
    slots.check()
    rows, heads, d = query.shape
    check(
        rows == slots.event.numel() and heads % slots.heads == 0 and d == slots.keys.shape[-1],
        f"queries of {rows} rows, {heads} query heads, dimension {d}, for keys of {slots.event.numel()} rows, "
        f"{slots.heads} heads, dimension {slots.keys.shape[-1]}: heads of queries must be a multiple, the rest equal",
    )
    check(sinks is None or sinks.numel() == heads, f"{heads} query heads need as many sinks")
    if choose(backend, query, slots.keys, slots.values) == "reference":
        return reference.paged_attention(query, slots, scaling, softcap, sinks)
    from keepkv.kernels.paged import triton  # only here, since Triton may be missing

    return triton.paged_attention(query, slots, scaling, softcap, sinks)
