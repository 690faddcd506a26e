"""Numbers as people write them: tokens ("128k"), bytes ("24GiB")."""

from __future__ import annotations

import os
import re

import torch

from keepkv.core.budget import Budget
from keepkv.core.options import MOST, Size, shown, taken
from keepkv.errors import BudgetError, KeepKVError

_TIMES = {"": 1, "K": 2**10, "M": 2**20}
_BYTES = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


def read_tokens(value: str | int, name: str = "context") -> int:
    """``131072``, ``"131072"``, ``"131,072"``, ``"128k"`` or ``"1M"`` as a number of tokens; k is 1,024."""
    if not isinstance(value, str):
        return int(taken("fit", name, value, Size))
    match = re.fullmatch(r"\s*([0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?)\s*([kKmM]?)\s*", value)
    tokens = float(match[1].replace(",", "")) * _TIMES[match[2].upper()] if match else 0.0
    if not tokens.is_integer() or not 1 <= tokens <= MOST:
        raise KeepKVError(
            f"{name}={shown(value)} is no number of tokens. Give a whole number, such as 131072, or one with k (1,024) "
            "or M (1,048,576) behind it, such as 128k."
        )
    return int(tokens)


def read_bytes(value: str | int, name: str = "memory") -> int:
    """``"24GiB"``, or a number of bytes."""
    if not isinstance(value, str):
        return int(taken("fit", name, value, int))
    try:
        found = Budget.of(value).bytes
    except BudgetError:
        found = None
    if found is None:
        raise KeepKVError(
            f"{name}={shown(value)} is no amount of memory. Give a number and its unit: B, KB, MB, GB (powers of "
            "1,000), KiB, MiB, GiB (powers of 1,024), such as 24GiB."
        )
    return found


def own_memory() -> tuple[int, str] | None:
    """Bytes of the first GPU, or of this machine where it has none, and what they are; None where nobody tells."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"
    except (AttributeError, OSError, ValueError):  # not a Unix
        return None


def tokens(count: int) -> str:
    """``128k`` where that is exact, else the number."""
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else f"{count:,}"


def size(count: int) -> str:
    """Bytes in the unit that suits them."""
    unit = next((name for name, times in _BYTES.items() if count >= times), "KiB")
    number = count / _BYTES[unit]
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.1f} {unit}"
