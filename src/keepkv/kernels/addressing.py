"""Where a Triton program finds its slots, and the arithmetic of softmax that programs share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def segment(pair, heads, first, lengths, slots):
    """Row and head of the ``pair``-th (row, head), where its slots begin, and how many it has, as in ``Segments``.

    first, lengths: pointers, or None for a rectangle of ``slots`` columns.
    """
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    start = tl.zeros((), tl.int64)
    count = slots
    if first is not None:
        start = tl.load(first + pair)
        count = tl.load(lengths + pair).to(tl.int32)
    return row, head, start, count


@triton.jit
def load_held(votes, positions, row, head, slot, inside, s_nb, s_nh, s_ns, s_pb, s_ph, s_ps):
    """Positions of the slots (N,) that lie ``inside``, and their votes, both (N,).

    A position is below 0 where no slot is, and 0 without ``positions``. Votes of empty slots are never read, whatever
    garbage they are: they are 0 there, and everywhere without ``votes``.
    """
    if positions is not None:
        held = tl.load(positions + row * s_pb + head * s_ph + slot * s_ps, mask=inside, other=-1)
    else:
        held = tl.where(inside, 0, -1)
    vote = tl.zeros(slot.shape, tl.float32)
    if votes is not None:
        vote = tl.load(votes + row * s_nb + head * s_nh + slot * s_ns, mask=held >= 0, other=0.0)
    return held, vote


@triton.jit
def load_keys(
    k, votes, positions, row, head, slot, inside, d, s_kb, s_kh, s_ks, s_nb, s_nh, s_ns, s_pb, s_ph, s_ps,
    D: tl.constexpr,
):  # fmt: skip
    """Keys (BLOCK_D,N) of the slots (N,) that lie ``inside``, 0 in empty ones; the rest as ``load_held``."""
    held, vote = load_held(votes, positions, row, head, slot, inside, s_nb, s_nh, s_ns, s_pb, s_ph, s_ps)
    k_at = k + row * s_kb + head * s_kh + slot[None, :] * s_ks + d[:, None]
    key = tl.load(k_at, mask=(held >= 0)[None, :] & (d < D)[:, None], other=0.0)
    return key, held, vote


@triton.jit
def logits(query, key, vote, scaling, softcap, VOTES: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr):
    """softcap(q·k·scaling) + vote, float32 (R,N), of queries (R,BLOCK_D) and keys (BLOCK_D,N)."""
    if UPCAST:
        query, key = query.to(tl.float32), key.to(tl.float32)
    return voted(tl.dot(query, key, input_precision="ieee") * scaling, vote, softcap, VOTES, SOFTCAP)


@triton.jit
def voted(u, vote, softcap, VOTES: tl.constexpr, SOFTCAP: tl.constexpr):
    """softcap(u) + vote of scaled products u (R,N)."""
    if SOFTCAP:
        u = softcap * (2 * tl.sigmoid(2 * u / softcap) - 1)  # tanh
    if VOTES:
        u += vote[None, :]
    return u


@triton.jit
def finite(top):
    """0 where the largest logit ``top`` is −inf, since −inf − −inf would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def log_sum(top, total):
    """Log of Σ e^u = ``total``·e^``top``: −inf where ``total`` is 0."""
    return tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
