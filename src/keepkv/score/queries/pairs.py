"""How little is attended to a slot and its neighbour together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor
from torch.nn.functional import pad

from keepkv.core.options import LARGE, Window, between
from keepkv.core.slots import LayerView
from keepkv.observe.attention import received
from keepkv.observe.window import window
from keepkv.score.base import register_score
from keepkv.score.decoding.before_window import Windowed


@register_score("pairs")
@dataclass(frozen=True)
class Pairs(Windowed):
    """What AsymKV (arXiv 2506.05410) and KVSlimmer (arXiv 2603.00907) rank pairs of neighbours by, at the earlier one:

        S_i = (a_i + a_{i+1})·(p_i + p_{i+1}) / tilt^{x_i}

    a: attention that a slot receives from the last ``window`` queries of the row, all its votes together, mean over
    the query heads of the KV head; p: its votes; x: how far back to front it stands among the slots of its head, from 0
    to 1, as recent queries attend to recent tokens. The last slot has no neighbour, and a_i·p_i alone.
    """

    window: Window = 32
    tilt: Annotated[float, between(1, LARGE)] = 49.0

    def __call__(self, view: LayerView) -> Tensor:
        attn, votes = received(view, *window(view, self.window)).mean(2), view.slots.log_votes.exp()
        attn, votes = (x + pad(x[..., 1:], (0, 1)) for x in (attn, votes))
        place = (view.slots.valid.cumsum(-1) - 1) / view.slots.lengths.clamp(min=1)[..., None]
        return attn * votes / self.tilt**place
