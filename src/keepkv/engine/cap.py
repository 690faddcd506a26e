"""The hard cap, ``When(cap=…)``: rows are compressed before a forward would take them past it, or it is refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keepkv.engine.allowance import layer_budget
from keepkv.engine.layer import Layer
from keepkv.engine.mask_rule import MaskRule
from keepkv.engine.state import CacheState
from keepkv.errors import BudgetError
from keepkv.methods.allowance import least


def full(layers: Sequence[Layer], rule: MaskRule) -> list[bool] | None:
    """Rows that a forward over ``rule`` would take past the cap; None: none of them, or no cap.

    Raises ``BudgetError``, and changes nothing, where a compression would not make room.
    """
    if not layers or (most := layers[0].shared.settings.method.when.cap) is None:
        return None
    shared, length = layers[0].shared, rule.arguments["q_length"]
    if shared.spare and min(shared.spare) >= length:  # padding counts here, where that makes no difference
        shared.spare = [n - length for n in shared.spare]
        return None
    new, held = _new(rule), _held(layers)
    over = held + new > most
    shared.spare = []
    if not bool(over.any()):
        shared.spare = (most - held - new).floor().long().tolist()
        return None
    shared.coming = new
    left = _left(layers, new)
    if not shared.compressing or bool((over & (left + new > most)).any()):
        raise _refusal(shared, new, held, left)
    return over.tolist()


def check(layers: Sequence[Layer], rule: MaskRule, full: list[bool] | None) -> None:
    """After rows that are ``full`` were compressed: raises ``BudgetError`` where the forward still does not fit."""
    if full is None:
        return
    shared, new, held = layers[0].shared, _new(rule), _held(layers)
    shared.coming, most = 0, shared.settings.method.when.cap
    assert most is not None
    if bool((held + new > most).any()):
        raise _refusal(shared, new, held, held)
    shared.spare = (most - held - new).floor().long().tolist()


def _new(rule: MaskRule) -> Tensor:
    """(B,) int64: tokens of each row that the forward brings."""
    batch, length = rule.arguments["batch_size"], rule.arguments["q_length"]
    if rule.padding is None:
        return torch.full((batch,), length, device=rule.arguments["device"])
    return rule.padding[:, -length:].sum(-1).to(rule.arguments["device"])


def _held(layers: Sequence[Layer]) -> Tensor:
    """(B,) float64: slots per KV head, a mean over heads that share a budget, the most of any layer that does not."""
    lengths = [x.store.lengths for x in layers if x.is_initialized]
    if not lengths:
        return torch.zeros(1, dtype=torch.float64)
    if layers[0].shared.settings.method.allocate.joint:
        return torch.cat(lengths, dim=1).double().mean(-1)
    return torch.stack([x.double().mean(-1) for x in lengths]).amax(0)


def _left(layers: Sequence[Layer], new: Tensor) -> Tensor:
    """(B,) float64: slots per KV head that a compression leaves."""
    shared = layers[0].shared
    read = [layer for layer in layers if layer.is_initialized]
    if not read:  # nothing to compress: what would be left of it
        slots = shared.settings.budget.slots
        floor = least(shared.settings.method, new) if slots is None else new.clamp(max=slots)
        return floor.double()
    budgets = torch.stack([layer_budget(layer).double() for layer in read])
    return budgets.mean(0) if shared.settings.method.allocate.joint else budgets.amax(0)


def _refusal(shared: CacheState, new: Tensor, held: Tensor, left: Tensor) -> BudgetError:
    most, budget = shared.settings.method.when.cap, shared.settings.budget
    shared.coming = 0
    assert most is not None
    row = int((held + new).argmax()) if len(held) == len(new) else int(new.argmax())
    said = f"a forward of {int(new[row])} tokens does not fit under When(cap={most})"
    if not shared.compressing:
        return BudgetError(
            f"{said}: {int(held[row])} slots per head are held, and cache.compressing is False. Ask less, take back "
            "what was asked with cache.crop(-n), or let the cache compress."
        )
    room = max(0, int(most - left[row]))
    return BudgetError(
        f"{said}: a compression leaves {int(left[row])} slots per head (budget of {budget}), and room for {room} "
        f"tokens. Feed no more at a time, with generate(…, prefill_chunk_size={max(1, room)}) say, or give a larger "
        "cap or a smaller budget."
    )
