"""How Triton kernels are launched: sizes of tiles and of grids, arguments, and the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from keepkv.kernels.dispatch import interpreting
from keepkv.kernels.logits import KeySlots

TILE_BYTES = 1 << 14  # of keys or values: two of each in flight fit into 100 KiB of shared memory
PROGRAMS = 4  # per multiprocessor, so that loads of some hide the waits of others
MIN_DOT = 16  # rows of the smallest matrix product on tensor cores


def next_power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``n`` and ``least``: extents of tiles are powers of two."""
    return max(least, 1 << max(0, n - 1).bit_length())


def slots_per_tile(x: Tensor, *dims: int, size: int = TILE_BYTES) -> int:
    """Slots in a tile of ``size`` bytes, which the widest of fields of ``dims`` numbers in the dtype of ``x`` fills."""
    return min(128, max(16, size // (next_power_of_two(max(dims)) * x.element_size())))


def rows_per_tile(x: Tensor, rows: int, d: int) -> int:
    """How many of ``rows`` vectors of dimension ``d`` one program holds beside a tile of slots."""
    return min(64, slots_per_tile(x, d), next_power_of_two(rows, MIN_DOT))


@lru_cache
def programs(device: torch.device, each: int = PROGRAMS) -> int:
    """Programs that keep the whole device busy, ``each`` on every multiprocessor."""
    if device.type != "cuda":
        return each
    return each * torch.cuda.get_device_properties(device).multi_processor_count


def split(longest: int, total: int, tile: int, wanted: int) -> tuple[int, int]:
    """How many slots one of about ``wanted`` programs reads, a multiple of ``tile``, and into how many parts that cuts
    the longest head.

    Parts are of one size for all heads, so that a head with ten times the slots gets ten times the programs.
    """
    chunk = tile * max(1, -(-total // (wanted * tile)))
    return chunk, max(1, -(-longest // chunk))


def upcast(x: Tensor) -> bool:
    """Whether matrix products must be given float32: Triton's interpreter multiplies the bits of bfloat16."""
    return x.dtype == torch.bfloat16 and interpreting()


def rowwise(x: Tensor) -> Tensor:
    """``x`` with the elements of a slot side by side, as kernels read them; copied only if they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def slot_arguments(slots: KeySlots) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """What kernels take of ``slots``: keys, votes, positions, first and lengths; and the strides of the first three."""
    votes = None if slots.log_votes is None else slots.log_votes.float()
    fields, segments = (rowwise(slots.keys), votes, slots.positions), slots.segments
    return (*fields, segments.first, segments.lengths), tuple(step for x in fields for step in segments.strides(x))


def device_of(x: Tensor) -> AbstractContextManager[None]:
    """Makes the device of ``x`` the current one, on which kernels are launched."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()
