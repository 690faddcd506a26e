"""Nearest kept key of every leaving slot, without the matrix of leaving × kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from keepkv.kernels.dispatch import check, choose

_TILE = 2**21  # elements of one tile of the similarity matrix: 8 MiB


def assign(keys: Tensor, leaving: Tensor, targets: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """For each leaving slot the target slot of largest key cosine in its row and head, and that cosine.

    keys (B,H,S,D); leaving, targets (B,H,S) bool. Returns slot indices (B,H,S) int64, −1 where a slot does not leave or
    its head has no target, and cosines (B,H,S) float32 (float64 for float64), −inf there. Of equal cosines the lowest
    index wins: ties go to the oldest target. A key of zeros has cosine 0 with every other.
    """
    check(
        leaving.shape == targets.shape == keys.shape[:3],
        f"leaving {tuple(leaving.shape)} and targets {tuple(targets.shape)} for keys {tuple(keys.shape)}: masks must "
        "have the shape of keys without the last dimension",
    )
    if choose(backend, keys) == "reference":
        return reference(keys, leaving, targets)
    from keepkv.kernels import assign_triton  # Triton is needed only here

    return assign_triton.assign(keys, leaving, targets)


def reference(keys: Tensor, leaving: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch. The similarity matrix exists only in tiles of leaving slots, so memory stays bounded
    whatever the context length."""
    b, h, s, _ = keys.shape
    wide = torch.promote_types(keys.dtype, torch.float32)
    into = torch.full((b, h, s), -1, dtype=torch.int64, device=keys.device)
    cosine = torch.full((b, h, s), float("-inf"), dtype=wide, device=keys.device)
    to, real_to = places(targets)
    source, real = places(leaving)
    if to.shape[-1] == 0 or source.shape[-1] == 0:
        return into, cosine
    columns = _unit(keys, to, wide).transpose(-1, -2)
    tile = max(1, _TILE // (b * h * to.shape[-1]))
    for start in range(0, source.shape[-1], tile):
        index = source[..., start : start + tile]
        similarity = _unit(keys, index, wide) @ columns
        best, column = similarity.masked_fill_(~real_to[:, :, None], float("-inf")).max(-1)
        found = real[..., start : start + tile] & ~best.isneginf()
        # Padded entries of `index` name slots that do not leave: they write back what is there.
        into.scatter_(2, index, torch.where(found, to.gather(2, column), into.gather(2, index)))
        cosine.scatter_(2, index, torch.where(found, best, cosine.gather(2, index)))
    return into, cosine


def places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (B,H,N) of the true entries of ``mask`` (B,H,S), padded at the end, and which of them are real."""
    size = int(mask.sum(-1).max()) if mask.numel() else 0
    index = mask.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :size]
    return index, mask.gather(-1, index)


def _unit(keys: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    picked = keys.gather(2, index[..., None].expand(*index.shape, keys.shape[-1]))
    return normalize(picked.to(dtype), dim=-1)
