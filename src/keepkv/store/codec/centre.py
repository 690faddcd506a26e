"""The mean key of each head, which is taken out before codes are written.

Where a head's keys have a large part in common, as a bias of their projection gives them, codes of few bits are spent
on that part. Taking it out changes every logit of a query by the same number, so that attention reads codes as it did:
see ``Part.shift``.
"""

from __future__ import annotations

from torch import Tensor, where

from keepkv.store.codec.base import Fields


def learn_mean(keys: Tensor, valid: Tensor, shared: Fields) -> Fields:
    """``shared`` with the mean (B,H,1,D) float32 of the valid ``keys`` (B,H,S,D), where a row has none yet."""
    inside = valid[..., None]
    total = keys.float().masked_fill(~inside, 0).sum(2, keepdim=True)
    mean, there = total / inside.sum(2, keepdim=True).clamp_min(1), inside.any(2, keepdim=True)
    if not shared:
        return {"mean": mean, "known": there}
    known = shared["known"]
    return {"mean": where(known, shared["mean"], mean), "known": known | there}
