"""What questions would ask of each slot, foretold from the slot's own key and value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.rope import Rope
from keepkv.core.slots import LayerView, Slots
from keepkv.errors import CalibrationError
from keepkv.score.base import Score, register_score

KIND = "gates"
WEIGHT, BIAS = NAMES = ("gates_weight", "gates_bias")  # (H,F) and (H,), float32, of each layer
NORMS = 2  # numbers of ``features`` beside the key's and the value's own


@register_score("gates")
@dataclass(frozen=True)
class Gates(Score):
    """S_i = w·[k̃_i, v_i, ‖k̃_i‖, ‖v_i‖] + b: ln of the largest attention that slot i would get from questions.

    k̃ is the key before RoPE. w and b of each KV head are fitted once per model, in closed form, while it answers
    questions on other texts, or reads texts a second time behind themselves, which makes them KVzip's score (arXiv
    2505.23416): ``keepkv calibrate gates``. Here nothing is read twice, and no query is looked at: the score of a slot
    never changes. Scores are on one scale for all heads and layers, and can share one budget. Gates that foretell
    KVzip's score are Fast KVzip's (arXiv 2601.17668) and KVzap's (arXiv 2601.07891) too: trained networks on hidden
    states there, a linear map of what the cache holds anyway here.
    """

    signed: ClassVar[bool] = True

    needs_rope: ClassVar[bool] = True
    needs_calibration: ClassVar[str | None] = KIND

    def __call__(self, view: LayerView) -> Tensor:
        assert view.calibration is not None
        weight, bias = (view.calibration[name] for name in NAMES)
        slots = view.slots
        wanted = slots.keys.shape[1], slots.keys.shape[-1] + slots.values.shape[-1] + NORMS
        if tuple(weight.shape) != wanted:
            raise CalibrationError(
                f"gates of {weight.shape[0]} heads and {weight.shape[1]} numbers for a layer that has {wanted[0]} and "
                f"{wanted[1]}: make them for this model with keepkv calibrate gates"
            )
        places = view.key_places()
        # A head at a time: what is turned back is as large as the keys.
        heads = [features(slots, view.rope, places, head) @ weight[head] + bias[head] for head in range(wanted[0])]
        return torch.stack(heads, dim=1)


def features(slots: Slots, rope: Rope | None, places: Tensor, head: int) -> Tensor:
    """[k̃, v, ‖k̃‖, ‖v‖] (B,S,F) float32 of the slots of one KV head, k̃ the key before RoPE; ``rope`` None: as it is.
    places (B,H,S[,A]): rotary positions of the slots."""
    at = slice(head, head + 1)
    keys, values = slots.keys[:, at].float(), slots.values[:, at].float()
    if rope is not None:
        keys = rope.unrotate(keys, places[:, at])
    norms = (keys.norm(dim=-1, keepdim=True), values.norm(dim=-1, keepdim=True))
    return torch.cat((keys, values, *norms), dim=-1)[:, 0]
