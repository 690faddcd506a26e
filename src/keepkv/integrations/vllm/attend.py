"""Attention of one request over slots that a stock kernel cannot read: votes, heads of different lengths, a hole."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.attention.attend import attend
from keepkv.attention.part import Part
from keepkv.core.slots import Slots


def attend_slots(
    query: Tensor, slots: Slots, scaling: float, votes: bool, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Output (T,Hq,Dv) of ``query`` (T,Hq,D), whose tokens are the newest T of ``slots`` (1,H,S,…).

    votes: whether any slot may have votes. softcap, sinks (Hq,): of the model's attention, None where it has none.
    """
    tokens = query.shape[0]
    block = None
    if tokens > 1:
        block = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()[None, None]
    part = Part(slots.keys, slots.values, slots.log_votes if votes else None, slots.positions)
    done = attend(query.transpose(0, 1)[None], [part], scaling, block=block, softcap=softcap, sinks=sinks)
    return done.output[0].transpose(0, 1)
