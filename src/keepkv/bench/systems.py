"""Who takes part in a sweep: methods of keepkv, caches of transformers, methods of kvpress."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from keepkv.core.budget import Budget
from keepkv.errors import KeepKVError, UnknownName
from keepkv.measure.rows import method_label, plain

# Caches of transformers: backend and bits. fp8 has no bits to choose.
QUANTISED: dict[str, tuple[str, int | None]] = {
    **{f"quanto-{bits}": ("quanto", bits) for bits in (2, 4)},
    **{f"hqq-{bits}": ("hqq", bits) for bits in (2, 4, 8)},
    "fp8": ("fp8", None),
}
# Presses of kvpress 0.5.5 by the name of the method here, with its own defaults; wrapped in "press" what it adapts.
PRESSES: dict[str, dict[str, Any]] = {
    "adakv": {"press": "AdaKVPress", "inner": "SnapKVPress"},
    "expected-attention": {"press": "ExpectedAttentionPress"},
    "keydiff": {"press": "KeyDiffPress"},
    "knorm": {"press": "KnormPress"},
    "pyramidkv": {"press": "PyramidKVPress"},
    "random": {"press": "RandomPress"},
    "snapkv": {"press": "SnapKVPress"},
    "streaming-llm": {"press": "StreamingLLMPress"},
    "tova": {"press": "TOVAPress"},
}


@dataclass(frozen=True)
class System:
    """One way to hold the cache.

    library: "keepkv", "transformers" or "kvpress". method: of keepkv; "plain" or a key of ``QUANTISED``; a key of
    ``PRESSES``. budget: None for what has none. store, store_options: of keepkv.
    """

    library: str
    method: str
    budget: float | int | str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    store: str | None = None
    store_options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The system as the command line takes it: ``keepkv:key=zip``, ``plain``, ``kvpress:snapkv``."""
        name = method_label(self.method, {key: plain(value) for key, value in self.options.items()})
        return f"kvpress:{name}" if self.library == "kvpress" else name

    def spec(self) -> dict[str, Any]:
        """What a worker process needs to know, as plain data."""
        made: dict[str, Any] = plain(self)
        return made


PLAIN = System("transformers", "plain")


def peers(names: list[str], budgets: list[float | int | str]) -> list[System]:
    """``plain``, ``fp8``, ``quanto-4`` … once each, and ``kvpress:METHOD`` with every budget.

    Raises ``UnknownName``.
    """
    found: list[System] = []
    for name in names:
        library, colon, method = name.partition(":")
        if not colon and (name == "plain" or name in QUANTISED):
            found.append(System("transformers", name))
        elif library == "kvpress" and method in PRESSES:
            found += [System("kvpress", method, budget) for budget in budgets]
        else:
            raise UnknownName("peer", name, ["plain", *QUANTISED, *(f"kvpress:{one}" for one in PRESSES)])
    return list({(one.label, str(one.budget)): one for one in found}.values())


def slots_asked(budget: float | int | str | None, context: int) -> int:
    """Slots per head that a budget leaves of ``context`` tokens; None leaves all. Raises for budgets in bytes, which
    say nothing about the slots of a row."""
    if budget is None:
        return context
    asked = Budget.of(budget)
    if asked.bytes is not None or asked.share_of_bytes is not None:
        raise KeepKVError(f"budget of {asked}: give a share or slots per head, which say what one row takes")
    if asked.slots is not None:
        return min(asked.slots, context)
    return max(1, int(context * (asked.share or 1.0) + 1e-9))
