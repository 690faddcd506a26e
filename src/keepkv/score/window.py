"""The last queries of each row, remembered between forwards for scores that look through a window."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.slots import EMPTY, LayerView


def remember(view: LayerView, size: int, name: str = "window") -> None:
    """Keep the last ``size`` queries of each row in ``view.state``.

    Sets ``state[name]`` (B,H*G,size,D) and ``state[name + "_positions"]`` (B,size), oldest first, ``EMPTY`` where
    fewer were seen. Padding never pushes a real query out: only left padding exists, so it is the oldest.
    In one-token steps the tensors are updated in place, as compiled decode requires.
    """
    queries, positions = view.queries[:, :, -size:], view.query_positions[:, -size:]
    held, held_positions = view.state.get(name), view.state.get(f"{name}_positions")
    if held is None or held_positions is None:
        b, heads, _, d = queries.shape
        held, held_positions = queries.new_zeros(b, heads, size, d), positions.new_full((b, size), EMPTY)
        view.state[name], view.state[f"{name}_positions"] = held, held_positions
    real = (positions >= 0).sum(-1, keepdim=True)  # (B,1)
    # Row by row: the last `size` of (held, new) where a row's padded new columns do not count.
    source = torch.arange(size, device=positions.device) + real  # index into held ++ new without padding
    skip = (source >= size) * (positions.shape[1] - real)
    index = source + skip
    all_positions = torch.cat((held_positions, positions), dim=1)
    all_queries = torch.cat((held, queries), dim=2)
    held_positions.copy_(all_positions.gather(1, index))
    wide = index[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
    held.copy_(all_queries.gather(2, wide))


def window(view: LayerView, size: int, name: str = "window") -> tuple[Tensor, Tensor]:
    """Queries (B,H*G,W,D) and positions (B,W) of the last ``size`` queries: remembered ones if ``remember`` ran,
    otherwise those of the latest forward."""
    if name in view.state:
        return view.state[name][:, :, -size:], view.state[f"{name}_positions"][:, -size:]
    return view.queries[:, :, -size:], view.query_positions[:, -size:]
