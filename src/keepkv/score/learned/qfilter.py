"""How far a key lies in the direction that the queries of a model have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.errors import CalibrationError
from keepkv.score.base import Score, register_score

KIND = "q-filters"
NAME = "qfilter"  # (H,D), float32, of each layer


@register_score("q-filter")
@dataclass(frozen=True)
class QFilter(Score):
    """Q-Filters (arXiv 2503.02812): S_i = −f·k_i, f the filter of the KV head, k as it is cached.

    −f is the main direction of the queries of the head, on the side where they lie: keys against it get little
    attention whatever the query. It is found once per model: ``keepkv calibrate q-filters``. No query of the text is
    looked at.
    """

    signed: ClassVar[bool] = True

    needs_calibration: ClassVar[str | None] = KIND
    scores_within_spans: ClassVar[bool] = True

    def __call__(self, view: LayerView) -> Tensor:
        assert view.calibration is not None
        (_, h, _), d, found = view.slots.shape, view.slots.keys.shape[-1], view.calibration[NAME]
        if tuple(found.shape) != (h, d):
            raise CalibrationError(
                f"q-filters {tuple(found.shape)} for a layer of {h} heads and {d} dims: make them for this model with "
                "keepkv calibrate q-filters"
            )
        return -(view.slots.keys.float() @ found[:, :, None].to(view.slots.keys.device))[..., 0]
