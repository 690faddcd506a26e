"""What the heads of a layer say of a token together."""

from __future__ import annotations

from torch import Tensor


def over_heads(scores: Tensor, positions: Tensor) -> Tensor:
    """Sum (B,H,S) over heads of the scores (B,H,S) of the token in each slot, whose ``positions`` (B,H,S) match them.

    Heads may hold different tokens; one without the token adds nothing.
    """
    index = positions.clamp(min=0).long()
    table = scores.new_zeros(scores.shape[0], int(index.max()) + 1 if index.numel() else 1)  # by position
    for head in range(scores.shape[1]):  # one head at a time: the order of additions is fixed on any device
        table.scatter_add_(1, index[:, head], scores[:, head].masked_fill(positions[:, head] < 0, 0.0))
    return table[:, None].expand(-1, index.shape[1], -1).gather(2, index)
