"""Nearest keys in plain torch: what the kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from keepkv.core.pick import pick

_TILE = 2**22  # elements of one tile of the similarity matrix: 16 MiB
EPS = 1e-12  # least norm, as in torch's ``normalize``


@torch.no_grad()
def nearest_key(keys: Tensor, leaving: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """``kernels.nearest_key`` with its arguments checked.

    The similarity matrix exists only in tiles of leaving slots, in one buffer: however long the context, memory stays
    bounded.
    """
    b, h, s, d = keys.shape
    wide = torch.promote_types(keys.dtype, torch.float32)
    into = torch.full((b, h, s), -1, dtype=torch.int64, device=keys.device)
    cosine = torch.full((b, h, s), float("-inf"), dtype=wide, device=keys.device)
    to, real_to = padded_indices(targets)
    n = to.shape[-1]
    if n == 0 or not bool(leaving.any()):
        return into, cosine
    columns = normalize(pick(keys, to).to(wide), dim=-1).mT.flatten(0, 1).contiguous()  # (B·H,D,N)
    absent = None if bool(real_to.all()) else ~real_to.flatten(0, 1)[:, None]
    index, _ = padded_indices(leaving)
    every = 2 * index.shape[-1] > s  # most of them leave: to compute all is cheaper than to pick those
    count = s if every else index.shape[-1]
    tile = min(count, max(1, _TILE // (b * h * n)))
    buffer = keys.new_empty(b * h, tile, n, dtype=wide)
    for start in range(0, count, tile):
        stop = min(start + tile, count)
        part = None if every else index[..., start:stop]
        rows = keys[:, :, start:stop] if part is None else pick(keys, part)
        dots = torch.bmm(rows.reshape(b * h, -1, d).to(wide), columns, out=buffer[:, : stop - start])
        if absent is not None:
            dots.masked_fill_(absent, float("-inf"))
        best, column = (x.view(b, h, -1) for x in dots.max(-1))
        found = to.gather(2, column).masked_fill_(best.isneginf(), -1)
        if part is None:
            into[:, :, start:stop], cosine[:, :, start:stop] = found, best
        else:  # padded entries name slots that do not leave: undone below
            into.scatter_(2, part, found)
            cosine.scatter_(2, part, best)
    cosine /= torch.linalg.vector_norm(keys, dim=-1, dtype=wide).clamp_min_(EPS)
    return into.masked_fill_(~leaving, -1), cosine.masked_fill_(~leaving, float("-inf"))


def padded_indices(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (B,H,N) of the true entries of ``mask`` (B,H,S), padded at the end, and which of them are real."""
    size = int(mask.sum(-1).max()) if mask.numel() else 0
    index = mask.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :size]
    return index, mask.gather(-1, index)
