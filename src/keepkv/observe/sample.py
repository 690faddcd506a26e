"""A fixed number of queries out of all that a row has seen, remembered between forwards."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.core.golden import NEVER, golden_order
from keepkv.core.slots import EMPTY, LayerView


def remember_sample(view: LayerView, size: int, name: str = "sample") -> None:
    """Keep ``size`` queries of each row in ``view.state``: those whose positions come first in ``spread``.

    Sets ``state[name]`` (B,H*G,size,D), queries after RoPE, and ``state[name + "_positions"]`` (B,size), ascending,
    ``EMPTY`` first where fewer were seen. Which queries these are follows from their positions alone: chunks of a
    prompt make no difference, nor does padding. In place, as compiled decode requires.
    """
    b, heads, _, d = view.queries.shape
    if name not in view.state:
        view.state[name] = view.queries.new_zeros(b, heads, size, d)
        view.state[f"{name}_positions"] = view.query_positions.new_full((b, size), EMPTY)
    held, held_positions = view.state[name], view.state[f"{name}_positions"]
    positions = torch.cat((held_positions, view.query_positions), dim=1)
    order = golden_order(positions).masked_fill(positions < 0, NEVER)
    chosen = order.topk(size, dim=1, largest=False, sorted=False).indices
    chosen = chosen.gather(1, positions.gather(1, chosen).argsort(dim=1, stable=True))
    old = chosen < size

    def take(x: Tensor, index: Tensor) -> Tensor:
        return x.gather(2, index[:, None, :, None].expand(-1, heads, -1, d))

    if view.queries.shape[2]:
        new = take(view.queries, (chosen - size).clamp(min=0))
        held.copy_(torch.where(old[:, None, :, None], take(held, chosen.clamp(max=size - 1)), new))
        held_positions.copy_(positions.gather(1, chosen))


def sample(view: LayerView, size: int, name: str = "sample") -> tuple[Tensor, Tensor]:
    """Queries (B,H*G,size,D) and positions (B,size): what ``remember_sample`` keeps, or a sample of the latest forward
    where it never ran."""
    if name in view.state:
        return view.state[name], view.state[f"{name}_positions"]
    state: dict[str, Tensor] = {}
    scratch = LayerView(view.slots, view.queries, view.query_positions, view.seen, view.scaling, state)
    remember_sample(scratch, size, name)
    return state[name], state[f"{name}_positions"]
