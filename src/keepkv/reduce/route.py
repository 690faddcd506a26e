"""Where a leaving slot goes: the kept slot with the most similar key, in the same row and head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from keepkv.score.masses import exact_dtype

_TILE = 2**23  # elements of one tile of the similarity matrix


def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (B,H,N) of the true entries of ``mask`` (B,H,S), padded at the end, and which of them are real."""
    size = int(mask.sum(-1).max()) if mask.numel() else 0
    index = mask.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :size]
    return index, mask.gather(-1, index)


def _unit(keys: Tensor, index: Tensor) -> Tensor:
    picked = keys.gather(2, index[..., None].expand(*index.shape, keys.shape[-1]))
    return normalize(picked.to(exact_dtype(keys)), dim=-1)


def nearest(keys: Tensor, leaving: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """For each leaving slot the target slot of largest key cosine, and that cosine.

    keys (B,H,S,D); leaving, targets (B,H,S) bool. Returns slot indices (B,H,S) int64, −1 where a slot does not leave
    or its head has no target, and cosines (B,H,S), −inf there. The similarity matrix exists only in tiles of leaving
    slots, so memory stays bounded whatever the context length. Ties go to the oldest target.
    """
    b, h, s, _ = keys.shape
    into = torch.full((b, h, s), -1, dtype=torch.int64, device=keys.device)
    cosine = torch.full((b, h, s), float("-inf"), dtype=exact_dtype(keys), device=keys.device)
    to, real_to = compact(targets)
    source, real = compact(leaving)
    if to.shape[-1] == 0 or source.shape[-1] == 0:
        return into, cosine
    columns = _unit(keys, to).transpose(-1, -2)
    tile = max(1, _TILE // (b * h * to.shape[-1]))
    for start in range(0, source.shape[-1], tile):
        index = source[..., start : start + tile]
        similarity = _unit(keys, index) @ columns
        best, column = similarity.masked_fill_(~real_to[:, :, None], float("-inf")).max(-1)
        found = real[..., start : start + tile] & ~best.isneginf()
        # Padded entries of `index` name slots that do not leave: they write back what is there.
        into.scatter_(2, index, torch.where(found, to.gather(2, column), into.gather(2, index)))
        cosine.scatter_(2, index, torch.where(found, best, cosine.gather(2, index)))
    return into, cosine
