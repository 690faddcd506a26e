"""Where a layer stands in its model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from keepkv.core.options import shown
from keepkv.core.rope import Rope
from keepkv.errors import KeepKVError


@dataclass(frozen=True)
class LayerInfo:
    """One compressed layer of a model.

    index: among all layers of the model. rank of ranks: among those that are compressed. rope: how its keys are
    rotated; None where they are not, or where nobody asked. is_shared: later layers attend to this layer's slots.
    output: where somebody asked, gives the weight (H*G,Dv,E) of the output projection on a device.
    """

    index: int = 0
    rank: int = 0
    ranks: int = 1
    rope: Rope | None = None
    is_shared: bool = False
    output: Callable[[torch.device], Tensor] | None = field(default=None, compare=False)

    def among(self, dense: tuple[int, ...]) -> bool:
        """Whether it is one of ``dense``, ranks of layers, from the end where below 0. Raises ``KeepKVError`` for one
        that there is not."""
        if wrong := [x for x in dense if not (type(x) is int and -self.ranks <= x < self.ranks)]:
            raise KeepKVError(
                f"dense={shown(dense)}: {shown(wrong[0])} is no layer of the {self.ranks} that are compressed. Give "
                f"whole numbers from {-self.ranks} to {self.ranks - 1}, such as (0, -1)."
            )
        return self.rank in {x % self.ranks for x in dense}
