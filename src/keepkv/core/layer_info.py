"""Where a layer stands in its model."""

from __future__ import annotations

from dataclasses import dataclass

from keepkv.core.rope import Rope


@dataclass(frozen=True)
class LayerInfo:
    """One compressed layer of a model.

    index: among all layers of the model. rank of ranks: among those that are compressed. rope: how its keys are
    rotated; None where they are not, or where nobody asked. is_shared: later layers attend to this layer's slots.
    """

    index: int = 0
    rank: int = 0
    ranks: int = 1
    rope: Rope | None = None
    is_shared: bool = False
