"""Attention as it is written in a book, beside the attention of every layer of every cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from keepkv.core.slots import Slots
from keepkv.engine.layer import Layer

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of outputs, relative to the largest value


def attention(
    query: Tensor, slots: Slots, positions: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Output (B,Hq,T,Dv) float64 of ``query`` (B,Hq,T,D) at ``positions`` (B,T) over every slot that is not younger."""
    groups = query.shape[1] // slots.keys.shape[1]
    keys, values = (x.double().repeat_interleave(groups, 1) for x in (slots.keys, slots.values))
    logits = query.double() @ keys.mT * scaling
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    logits = logits + slots.log_votes.double().repeat_interleave(groups, 1)[:, :, None]
    sees = slots.valid[:, :, None] & (slots.positions[:, :, None] <= positions[:, None, :, None])
    logits = logits.masked_fill(~sees.repeat_interleave(groups, 1), float("-inf"))
    if sinks is not None:
        extra = sinks.double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.cat((logits, extra), -1).softmax(-1)[..., :-1] @ values
    return logits.softmax(-1) @ values


@contextmanager
def watched() -> Iterator[None]:
    """Every forward of every layer is compared with ``attention`` over the slots that the layer says it holds."""
    attend, update = Layer.attend, Layer.update

    def checked(self: Layer, module: Any, query: Tensor, rule: Any, **given: Any) -> Tensor:
        slots = self.form.view(self.store.view()).map(torch.clone)
        out = attend(self, module, query, rule, **given)
        at = self.shared.positions.positions
        assert at is not None
        scaling = given.get("scaling") or query.shape[-1] ** -0.5
        want = attention(self.form.query(module, query), slots, at, scaling, given.get("softcap"), given.get("s_aux"))
        want = self.form.output(module, want.to(query.dtype)).transpose(1, 2)
        off = (out - want).abs()[at >= 0].max()
        limit = TOLERANCE[query.dtype] * max(1.0, float(want[at >= 0].abs().max()))
        assert off <= limit, f"layer {self.info.index}: output is {off} off that of its slots"
        return out

    def noted(self: Layer, keys: Tensor, values: Tensor, *args: Any, **given: Any) -> Any:
        handed = update(self, keys, values, *args, **given)
        slots, new = self.store.view(), keys.shape[2]
        at = self.shared.positions.positions
        assert at is not None
        for name, x in (("keys", keys), ("values", values)):
            held = getattr(slots, name)[:, :, -new:]
            assert torch.equal(held.transpose(1, 2)[at >= 0], x.transpose(1, 2)[at >= 0]), f"{name} of new tokens"
        assert (slots.positions[:, :, -new:] == at[:, None]).all(), "positions of new tokens"
        return handed

    Layer.attend, Layer.update = checked, noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Layer.attend, Layer.update = attend, update  # type: ignore[method-assign]
