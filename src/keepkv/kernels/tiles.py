"""Sizes of tiles and of grids, and where kernels are launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from keepkv.kernels.dispatch import interpreting

TILE_BYTES = 1 << 14  # of keys or values: two of each in flight fit into 100 KiB of shared memory
PROGRAMS = 4  # per multiprocessor, so that loads of some hide the waits of others
MIN_DOT = 16  # rows of the smallest matrix product on tensor cores


def power(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``n`` and ``least``: extents of tiles are powers of two."""
    return max(least, 1 << max(0, n - 1).bit_length())


def slots_per_tile(x: Tensor, *dims: int) -> int:
    """Slots whose widest field, of the head dimensions ``dims``, fills a tile."""
    return min(128, max(16, TILE_BYTES // (power(max(dims)) * x.element_size())))


def rows_per_tile(x: Tensor, rows: int, d: int) -> int:
    """Of ``rows`` rows of dimension ``d``, how many one program holds beside a tile of slots."""
    return min(64, slots_per_tile(x, d), power(rows, MIN_DOT))


@lru_cache
def programs(device: torch.device) -> int:
    """Programs that keep the whole device busy."""
    if device.type != "cuda":
        return PROGRAMS
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def split(longest: int, total: int, tile: int, device: torch.device) -> tuple[int, int]:
    """Slots that one program reads, a multiple of ``tile``, and into how many parts that cuts the longest head.

    Parts are of one size for all heads, so that a head with ten times the slots gets ten times the programs.
    """
    share = -(-total // programs(device))
    chunk = tile * max(1, -(-share // tile))
    return chunk, max(1, -(-longest // chunk))


def upcast(x: Tensor) -> bool:
    """Whether matrix products must be given float32: Triton's interpreter multiplies the bits of bfloat16."""
    return x.dtype == torch.bfloat16 and interpreting()


def on(x: Tensor) -> AbstractContextManager[None]:
    """Kernels are launched on the current device, which must be that of ``x``."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()
