"""Kept slots moved together in place: memory is not needed twice."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from keepkv.kernels.dispatch import check, choose
from keepkv.kernels.layout import Layout, layout
from keepkv.slots import EMPTY


def compact(
    fields: Mapping[str, Tensor],
    keep: Tensor,
    *,
    offsets: Tensor | None = None,
    lengths: Tensor | None = None,
    longest: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Move the kept slots of each (row, head) to the front of its segment, order kept. Modifies ``fields``.

    fields: tensors (B,H,S) or (B,H,S,D) by name, of any dtype: keys, values, votes, positions, statistics. keep
    (B,H,S) bool. With offsets and lengths (B,H): ragged fields (N,) or (N,D) and keep (N,), each segment compacted
    where it lies, so that offsets stay as they are. Returns the new lengths (B,H) int64. Behind them ``positions`` are
    set to empty; other fields hold what they held or what was moved away.
    """
    check("positions" in fields, f"fields {', '.join(fields)}: positions are needed, which tell empty slots")
    space = layout(keep, 0, offsets, lengths, longest)
    check(lengths is None or offsets is not None, "lengths without offsets: empty slots are those that are not kept")
    for name, x in fields.items():
        check(
            x.shape[: keep.dim()] == keep.shape and x.dim() <= keep.dim() + 1,
            f"{name} {tuple(x.shape)} for keep {tuple(keep.shape)}: a field has the slots of keep, and at most one "
            "dimension more",
        )
        check(x.dim() == keep.dim() or x.stride(-1) == 1, f"{name}: the elements of a slot must lie side by side")
    if choose(backend, *fields.values(), computes=False) == "reference":
        return reference(fields, keep, space)
    from keepkv.kernels import compact_triton  # Triton is needed only here

    return compact_triton.compact(fields, keep, space)


def reference(fields: Mapping[str, Tensor], keep: Tensor, space: Layout) -> Tensor:
    """The same in plain torch, which copies what is kept before it is written back."""
    index, inside = space.index()
    kept = space.take(keep, index, inside)
    counts = kept.sum(-1)
    # A stable sort brings what is kept to the front without changing its order.
    order = kept.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    source = order if index is None else index.gather(-1, order)
    columns = torch.arange(space.longest, device=keep.device).expand_as(source)
    to = columns if space.first is None else space.first[..., None] + columns
    new = columns < counts[..., None]
    for name, x in fields.items():
        if space.ragged:
            x[to[new]] = x[source[new]]
        else:
            moved = x.gather(2, source if x.dim() == 3 else source[..., None].expand_as(x))
            x.copy_(torch.where(new if x.dim() == 3 else new[..., None], moved, x))
        if name == "positions":
            gone = ~new if inside is None else ~new & inside
            if space.ragged:
                x[to[gone]] = EMPTY
            else:
                x.masked_fill_(gone, EMPTY)
    return counts
