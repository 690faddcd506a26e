"""Which codec a budget asks for: the split of bytes over slots and bits."""

from __future__ import annotations

from typing import Any

from keepkv.core.budget import Budget
from keepkv.errors import KeepKVError

AUTO = "auto"
Chosen = tuple[str, dict[str, Any]]
FOUR: Chosen = ("hadamard", {})
KEYS: Chosen = ("hadamard", {"key_bits": 8})  # values stay at 4
EIGHT: Chosen = ("hadamard", {"bits": 8})
# Shares up to which each is taken. Heads of 64 numbers and more fit into 30, 42 and 55 % of the bytes whole.
OF_BYTES: tuple[tuple[float, Chosen], ...] = ((0.45, FOUR), (0.6, KEYS))
OF_TOKENS: tuple[tuple[float, Chosen], ...] = ((0.5, FOUR),)


def settled(codec: str, options: dict[str, Any], budget: Budget) -> tuple[str, dict[str, Any]]:
    """Name and options of the codec, ``"auto"`` replaced by what ``budget`` asks for.

    Fewer bits cost less than fewer slots down to 4 bits, and 2 cost more (``benchmarks/frontier``). So nothing is
    written in more than 4 bits until every token fits into more. Of the bytes, up to 45 %: 4 bits; below 60 %: keys in
    8 and values in 4; above: 8. Of the tokens, which no codec makes more: up to 50 %: 4 bits, above: 8. All of either:
    "none". A number of slots, or of bytes: 4 bits, since how much must go depends on a length that is not known yet.
    """
    if codec != AUTO:
        return codec, options
    if options:
        raise KeepKVError(
            f"codec='auto' chooses its options by the budget, and {', '.join(options)} was given: name the codec too"
        )
    share, steps = (budget.share, OF_TOKENS) if budget.share is not None else (budget.share_of_bytes, OF_BYTES)
    if share is None:
        return FOUR
    return ("none", {}) if share >= 1 else next((chosen for most, chosen in steps if share <= most), EIGHT)
