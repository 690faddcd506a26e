"""Models in bfloat16 on processors that have no arithmetic for it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def multiply_in_float32(model: torch.nn.Module) -> None:
    """Have the linear maps of ``model`` multiply in float32 and round to bfloat16 after. What goes in and comes out is
    bfloat16 as before, the cache too: only the order of a sum is another. Takes twice the memory of the weights."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight, bias = module.weight.float(), None if module.bias is None else module.bias.float()

            def forward(x: Tensor, weight: Tensor = weight, bias: Tensor | None = bias) -> Tensor:
                return linear(x.float(), weight, bias).to(x.dtype)

            module.forward = forward  # type: ignore[method-assign]
