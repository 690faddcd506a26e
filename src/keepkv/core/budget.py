"""Budgets: one type for a share of the tokens or of the bytes, a number of slots, or bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from keepkv.core.options import MOST, UNFIT, Checked, Rate, Size, between, fitted, shown
from keepkv.core.words import exact_size
from keepkv.errors import BudgetError, KeepKVError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZES = {name.upper(): size for name, size in _UNITS.items()}  # their case does not matter
_FORMS = (
    "a share of the tokens (0.25 or '25%'), a share of the bytes of a plain cache ('10%bytes'), slots per KV head (an "
    "int, at least 1), or bytes for the whole cache ('256MiB')"
)


@dataclass(frozen=True)
class Budget(Checked):
    """What a cache may hold: exactly one of the four is set.

    share: of the tokens each row has seen. slots: per KV head (average over heads for adaptive allocations).
    bytes: for the whole cache, all rows and layers. share_of_bytes: of what a plain cache of the same tokens holds, so
    that slots which hold more, such as votes and statistics, are fewer, and packed ones more.
    """

    share: Rate | None = None
    slots: Size | None = None
    bytes: Annotated[int, between(1, 2**63 - 1)] | None = None
    share_of_bytes: Rate | None = None

    refusal: ClassVar[type[KeepKVError]] = BudgetError

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(x is not None for x in (self.share, self.slots, self.bytes, self.share_of_bytes)) != 1:
            raise BudgetError(f"{self!r}: give exactly one of share=, slots=, bytes= and share_of_bytes=")

    @classmethod
    def of(cls, value: Budget | float | int | str) -> Budget:
        """Read a budget; raises ``BudgetError`` naming the supported forms."""
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            return cls._read(value)
        if (slots := fitted(Size, value)) is not UNFIT:
            return cls(slots=slots)
        if (share := fitted(Rate, value)) is not UNFIT:
            return cls(share=share)
        raise BudgetError(f"budget={shown(value)}: expected {_FORMS}")

    @classmethod
    def _read(cls, text: str) -> Budget:
        if match := re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*(?:(?:of\s+)?(bytes|tokens))?\s*", text.lower()):
            if (share := fitted(Rate, float(match[1]) / 100)) is not UNFIT:
                return cls(share_of_bytes=share) if match[2] == "bytes" else cls(share=share)
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
        if match:
            number, size, unit = match[1], float(match[1]), match[2].upper()
            if unit in _SIZES and 1 <= size * _SIZES[unit] < 2**63:
                return cls(bytes=int(size * _SIZES[unit]))
            if not unit and size <= MOST:
                return cls.of(size if "." in number else int(number))
        raise BudgetError(f"budget={shown(text)}: expected {_FORMS}; units: {', '.join(_UNITS)}")

    @property
    def grows(self) -> bool:
        """Whether it is a share: the more tokens, the more slots."""
        return self.share is not None or self.share_of_bytes is not None

    def rate(self, density: float = 1.0) -> float:
        """Slots for each token of a budget that ``grows``, 1 at most. density: bytes of a token in a plain cache, by
        those of a slot here."""
        return min(1.0, self.share if self.share is not None else (self.share_of_bytes or 0.0) * density)

    def per_head(self, seen: Tensor, bytes_per_slot: int = 1, reserved: int = 0, density: float = 1.0) -> Tensor:
        """Slots per KV head (B,) float64 for rows that have seen ``seen`` (B,) tokens, 0 where bytes hold none.

        bytes_per_slot: what one slot of every KV head of every layer takes, for one row; reserved: bytes that are taken
        otherwise, 0 where they do not count; density: see ``rate``.
        """
        seen = seen.to(torch.float64)
        if self.grows:
            # The small term undoes binary rounding: 0.1 of 10 tokens is 1 slot, not 0.
            return (seen * self.rate(density) + 1e-9 - reserved / (bytes_per_slot * max(1, len(seen)))).floor()
        if self.slots is not None:
            return torch.full_like(seen, float(self.slots))
        assert self.bytes is not None
        return torch.full_like(seen, float(max(0, self.bytes - reserved) // (bytes_per_slot * len(seen))))

    def __str__(self) -> str:
        if self.share is not None:
            return f"{100 * self.share:g}% of the tokens"
        if self.share_of_bytes is not None:
            return f"{100 * self.share_of_bytes:g}% of the bytes"
        return f"{self.slots} slots per head" if self.slots is not None else exact_size(self.bytes or 0)

    @property
    def value(self) -> float | int | str:
        """In the form a user gives it."""
        if self.share is not None:
            return self.share
        if self.share_of_bytes is not None:
            return f"{100 * self.share_of_bytes:.12g}%bytes"
        return self.slots if self.slots is not None else f"{self.bytes}B"
