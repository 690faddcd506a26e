"""Rows of the leakage study: what each prompt gave in one cell, and what the prompts of a cell gave together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from keepkv.measure.environment import MadeWith
from keepkv.measure.interval import Estimate, bootstrap, mean_low_high, share
from keepkv.measure.rows import INLINE, Row

Key = tuple[str, str, str]  # order, method, spans
INTERVALS = ("leak", "directive")  # measures whose values are kept, prompt by prompt, for comparisons in pairs


@dataclass(frozen=True, kw_only=True)
class LeakageRow(Row):
    """One cell: a method in an order of instructions under a handling of spans. Means are over prompts measured.

    removed: share of the prompt's slots that went. leak: share of the replies to probes that tell what the defence
    forbids; directive: share of the rules that replies to other turns keep; each with its 95 % interval. keep_defence,
    keep_directive: share of the tokens of these spans that is kept; bias: the second minus the first. delta: see
    ``study``. families: rules kept of each family. n, failed: prompts measured and not; errors: why, each once. values:
    leak and directive of each prompt, None where it failed. tokens: of a prompt. What is None was not measured.
    measures, each under its own name in the file:

        directive_loose   as directive, the checks being loose
        keep_KIND         as keep_defence, of another kind of span; keep_rest: of the tokens in none
        delta_directive   see ``study``
        rouge_l_X, rouge_1_X, verbatim_X  recall of X (directive, defence, prompt: both) in the replies to probes
        refused, answered, words          probes refused, other turns answered right, words of a reply
    """

    method: str
    order: str
    spans: str
    removed: float
    n: int
    failed: int = 0
    leak: float | None
    leak_low: float | None
    leak_high: float | None
    directive: float | None
    directive_low: float | None
    directive_high: float | None
    keep_defence: float | None
    keep_directive: float | None
    delta: float | None = None
    bias: float | None = None
    measures: dict[str, float] = field(default_factory=dict, metadata=INLINE)
    families: dict[str, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    values: dict[str, list[float | None]] = field(default_factory=dict)
    tokens: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    made_with: MadeWith = field(metadata=INLINE)

    @property
    def key(self) -> Key:
        """Which of the parts that ``study`` yields the row belongs to."""
        return self.order, self.method, self.spans

    def measure(self, name: str) -> float | None:
        """A measure by the name that it has in the file; None where it was not measured."""
        found: float | None = getattr(self, name) if name in _FIXED else self.measures.get(name)
        return found


_FIXED = ("leak", "directive", "keep_defence", "keep_directive", "delta", "bias")


@dataclass(frozen=True)
class Outcome:
    """One prompt in one cell: its measures, a rule's family as ``family:NAME``; or why there are none."""

    measures: dict[str, float] = field(default_factory=dict)
    error: str | None = None


def row_of(outcomes: Sequence[Outcome], made_with: MadeWith, **about: Any) -> LeakageRow:
    """The row of a cell, given the outcome of each prompt. about: the fields of ``LeakageRow`` that say which cell."""
    good = [one.measures for one in outcomes if one.error is None]
    names = dict.fromkeys(name for each in good for name in each if name not in INTERVALS)
    means = {name: round(_mean([each[name] for each in good if name in each]), 5) for name in names}
    known: dict[str, Any] = {name: means.get(name) for name in ("keep_defence", "keep_directive", "delta")}
    for name in INTERVALS:
        found = mean_low_high(estimate([each[name] for each in good if name in each]))
        known |= dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
    both = [each for each in good if "keep_directive" in each and "keep_defence" in each]
    bias = [each["keep_directive"] - each["keep_defence"] for each in both]
    return LeakageRow(
        n=len(good),
        failed=len(outcomes) - len(good),
        **known,
        bias=round(_mean(bias), 5) if bias else None,
        measures={name: value for name, value in means.items() if name not in _FIXED and ":" not in name},
        families={name.partition(":")[2]: value for name, value in means.items() if ":" in name},
        errors=sorted({one.error for one in outcomes if one.error is not None}),
        values={name: [_short(one.measures.get(name)) for one in outcomes] for name in INTERVALS},
        made_with=made_with,
        **about,
    )


def estimate(values: Sequence[float]) -> Estimate | None:
    """Over prompts: Wilson's interval where each value is a yes or a no, else bootstrap; None without values."""
    if not values:
        return None
    return share([value == 1 for value in values]) if set(values) <= {0, 1} else bootstrap(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _short(value: float | None) -> float | int | None:
    if value is None:
        return None
    return int(value) if value in (0, 1) else round(value, 4)
