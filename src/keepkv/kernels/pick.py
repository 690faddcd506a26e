"""Queries out of those that are held and those that are new, by one index into both."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.kernels.dispatch import check, choose


def pick(
    chosen: Tensor,
    held: Tensor,
    order: Tensor,
    queries: Tensor,
    positions: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries (B,H,R,D) and their places in the text (B,H,R): position·G + query head within the group.

    chosen (B,H,R) int64: below R the entry of ``held`` (B,H,R,D) and ``order`` (B,H,R), from R on R + t·G + g for token
    t and query head g of ``queries`` (B,H·G,T,D) at ``positions`` (B,T).
    """
    (b, h, size, d), (_, heads, t, _) = held.shape, queries.shape
    check(
        chosen.shape == order.shape == (b, h, size) and queries.shape == (b, heads, t, d) and heads % h == 0 and t > 0,
        f"index {tuple(chosen.shape)} and order {tuple(order.shape)} into queries {tuple(held.shape)} and "
        f"{tuple(queries.shape)}: give (B,H,R) twice, (B,H,R,D) and (B,H*G,T,D)",
    )
    if choose(backend, held, queries) == "reference":
        return reference(chosen, held, order, queries, positions)
    from keepkv.kernels.pick_triton import pick as kernel  # Triton is needed only here

    return kernel(chosen, held, order, queries, positions)


def reference(chosen: Tensor, held: Tensor, order: Tensor, queries: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    (b, h, size, d), g = held.shape, queries.shape[1] // held.shape[1]
    rows = torch.arange(b, device=chosen.device)[:, None, None]
    first = torch.arange(0, h * g, g, device=chosen.device)[:, None]  # query head of each KV head
    old, before, index = chosen < size, chosen.clamp(max=size - 1), (chosen - size).clamp(min=0)
    token, head = index // g, index % g
    kept = held.gather(2, before[..., None].expand(-1, -1, -1, d))
    picked = torch.where(old[..., None], kept, queries[rows, head + first, token])
    return picked, torch.where(old, order.gather(2, before), positions[rows, token] * g + head)
