"""What a slot adds while the text is read a second time, by how much the outcome hangs on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.core.stats import Stat
from keepkv.observe.attention import strongest
from keepkv.observe.output import output_norms
from keepkv.score.base import WORTH, Score, register_score
from keepkv.score.passes.kvzip import STAT


@register_score("kvgrad")
@dataclass(frozen=True)
class KVgrad(Score):
    """KVgrad (openreview cg1wTCJjjk): max over queries t of the second reading, and the query heads of the KV head, of
    a_ti · ‖W_O v_i‖ · ‖∂Φ/∂o_t‖, with Φ = Σ_t ‖h_t‖² over the outputs of the last layer.

    a: attention; W_O v: what the value of slot i adds through the output projection of the query head; o_t: what the
    attention module returns for the query's token, which ``keepkv.reread`` takes the gradient by. Statistic ``reread``,
    as of ``KVzip``. Tokens that are decoded, and a text that was not reread, have no gradient: there the last factor
    is 1, which is another scale.
    """

    stats: ClassVar[dict[str, Stat]] = {STAT: Stat(0.0, "max")}
    observes: ClassVar[bool] = True
    follows_decode: ClassVar[bool] = True
    needs_second_reading: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = True
    needs_output: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        most = view.slots.stats[STAT]
        found = strongest(view, view.queries, view.query_positions, view.state.get(WORTH)) * output_norms(view)
        most.copy_(most.maximum(found.amax(2)).detach())

    def __call__(self, view: LayerView) -> Tensor:
        return view.slots.stats[STAT]
