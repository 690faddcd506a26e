"""Attention over slots in plain torch: the reference that every faster path is compared with.

Works part by part with a running log-sum-exp, so a store may hand over its slots in tiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.attention.part import Part, plain
from keepkv.attention.step import Attended, attend_one_token
from keepkv.kernels.logits import MASKED, cap_logits

TILE_BYTES = 64 << 20  # logits held at once for long query blocks


def attend(
    query: Tensor,
    parts: Iterable[Part],
    scaling: float,
    *,
    block: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    weights: bool = False,
) -> Attended:
    """Attention of ``query`` (B,Hq,T,D) over all slots of ``parts``.

    block (B|1,1,T,T) bool: which of the last T slots each query sees; None: all. They must lie in the last part.
    sinks (Hq,): logit of an extra softmax entry without value. Softmax and accumulation are float32 (float64 for
    float64 input); log votes are added after the soft cap. weights: return the attention weight of each slot too, for
    one token over rectangles; no key is read again for it.
    """
    t = query.shape[2]
    if t == 1 and block is None:
        return attend_one_token(query, parts, scaling, softcap, sinks, weights)
    # Rectangle after rectangle, each for all queries: what a store hands over in tiles is held one tile at a time.
    running: _Running | None = None
    rectangles = (rectangle for part in parts for rectangle in part.rectangles())
    for part, last in _with_last(rectangles):
        mask = block if last else None  # the last part ends with the newest tokens
        step = max(1, TILE_BYTES // (4 * query.shape[0] * query.shape[1] * part.positions.shape[-1]))
        # A long chunk on a compressed past: the logits held at once are bounded.
        spans = [slice(i, i + step) for i in range(0, t, step)]
        of_part = [
            _attend(query[:, :, at], part, scaling, None if mask is None else mask[:, :, at], softcap) for at in spans
        ]
        one = _Running(*(torch.cat(x, 3) for x in zip(*of_part, strict=True))) if len(of_part) > 1 else of_part[0]
        del of_part
        running = one if running is None else running.joined(one)
    assert running is not None
    out, lse = running
    h = lse.shape[1]
    if sinks is not None:
        out = out * torch.sigmoid(lse - sinks.to(lse.dtype).view(1, h, -1, 1, 1))
    return Attended(out.reshape(query.shape[0], query.shape[1], t, -1).to(query.dtype))


class _Running(NamedTuple):
    """Output (B,H,G,T,Dv) over the slots so far, and the log-sum-exp (B,H,G,T,1) of their logits."""

    out: Tensor
    lse: Tensor

    def joined(self, other: _Running) -> _Running:
        """Of both together; the memory of both is reused."""
        total = torch.logaddexp(self.lse, other.lse)
        rest = other.out.mul_((other.lse - total).exp_())
        return _Running(self.out.mul_((self.lse - total).exp_()).add_(rest), total)


def _attend(query: Tensor, part: Part, scaling: float, block: Tensor | None, softcap: float | None) -> _Running:
    """Attention of ``query`` (B,Hq,T,D) over one rectangle; block (B|1,1,T,N): which of its last N slots each sees."""
    (b, heads, t, d), h = query.shape, part.positions.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(wide) * scaling).reshape(b, h, heads // h * t, d)
    keys, values = plain(part)
    logits = cap_logits(grouped @ keys.to(wide).mT, softcap)
    logits = logits.view(b, h, heads // h, t, -1) + part.bias()[:, :, None, None]
    if block is not None:
        logits[..., logits.shape[-1] - block.shape[-1] :].masked_fill_(~block[:, :, None], MASKED)
    lse = logits.logsumexp(-1, keepdim=True)
    weights = (logits - lse).exp_().view(b, h, -1, logits.shape[-1])
    return _Running((weights @ values.to(wide)).view(b, h, heads // h, t, -1), lse)


def _with_last(parts: Iterable[Part]) -> Iterator[tuple[Part, bool]]:
    """Each of ``parts``, and whether none follows."""
    ahead = iter(parts)
    one = next(ahead)
    for following in ahead:
        yield one, False
        one = following
    yield one, True
