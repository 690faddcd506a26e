"""Which codec a budget asks for: the split of bytes over slots and bits."""

from __future__ import annotations

from typing import Any

from keepkv.core.budget import Budget
from keepkv.errors import KeepKVError

AUTO = "auto"
FOUR: tuple[str, dict[str, Any]] = ("hadamard", {})
EIGHT: tuple[str, dict[str, Any]] = ("hadamard", {"bits": 8})
BYTES, TOKENS = 0.4, 0.5  # shares of the bytes and of the tokens up to which 4 bits are taken


def settled(codec: str, options: dict[str, Any], budget: Budget) -> tuple[str, dict[str, Any]]:
    """Name and options of the codec, ``"auto"`` replaced by what ``budget`` asks for.

    A code costs an error that hardly depends on what is kept, and a slot that leaves costs more the fewer are left: so
    4 bits where much must go, 8 bits where little must, none where nothing must (``benchmarks/frontier``). A share of
    the bytes up to 40 %, or of the tokens up to 50 %: 4 bits; above: 8; all of them: "none". A number of slots, or of
    bytes: 4 bits, since how much must go depends on a length that is not known yet.
    """
    if codec != AUTO:
        return codec, options
    if options:
        raise KeepKVError(
            f"codec='auto' chooses its options by the budget, and {', '.join(options)} was given: name the codec too"
        )
    share, most = (budget.share, TOKENS) if budget.share is not None else (budget.share_of_bytes, BYTES)
    if share is None:
        return FOUR
    return ("none", {}) if share >= 1 else FOUR if share <= most else EIGHT
