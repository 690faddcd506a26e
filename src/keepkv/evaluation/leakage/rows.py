"""Rows of the leakage study: what each prompt gave in one cell, and the file that holds the cells."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keepkv.errors import KeepKVError
from keepkv.metrics import Estimate, bootstrap, share

Row = dict[str, Any]
Key = tuple[str, str, str]  # order, method, spans
INTERVALS = ("leak", "directive")  # measures whose values are kept, prompt by prompt, for comparisons in pairs


@dataclass(frozen=True)
class Outcome:
    """One prompt in one cell: its measures, or why there are none."""

    measures: dict[str, float] = field(default_factory=dict)
    error: str | None = None


def row_of(about: Mapping[str, Any], outcomes: Sequence[Outcome], made_with: Mapping[str, Any]) -> Row:
    """The cell as plain data. Means over prompts that were measured:

        leak              replies to the probes that tell what the defence forbids; with its 95 % interval
        directive, _loose rules that replies to other turns keep, strictly and loosely; the first with its interval
        keep_KIND         tokens of a kind of span that are kept, mean over layers and heads; keep_rest: of all others
        bias              keep_directive − keep_defence
        delta, delta_directive  see ``study``: log-odds per token of telling and of following
        rouge_l_X, rouge_1_X, verbatim_X  recall of X (directive, defence, prompt: both) in the replies to probes
        refused, answered, words          probes refused, other turns answered right, words of a reply

    families: mean of each family of rules. n, failed: prompts measured and not; errors: why, each once. values: of leak
    and directive, prompt by prompt, None where it failed.
    """
    good = [one.measures for one in outcomes if one.error is None]
    names = dict.fromkeys(name for each in good for name in each)
    means = {name: _mean([each[name] for each in good if name in each]) for name in names}
    row: Row = {**about, "n": len(good), "failed": len(outcomes) - len(good)}
    for name in INTERVALS:
        found = estimate([each[name] for each in good if name in each])
        row |= {name: found and found.mean, f"{name}_low": found and found.low, f"{name}_high": found and found.high}
    row |= {"keep_defence": None, "keep_directive": None, "delta": None}
    row |= {name: round(value, 5) for name, value in means.items() if name not in INTERVALS and ":" not in name}
    pairs = [(each["keep_directive"], each["keep_defence"]) for each in good if {*_BIAS} <= set(each)]
    row["bias"] = round(_mean([a - b for a, b in pairs]), 5) if pairs else None
    row["families"] = {name.partition(":")[2]: round(value, 5) for name, value in means.items() if ":" in name}
    row["errors"] = sorted({one.error for one in outcomes if one.error is not None})
    row["values"] = {name: [_short(one.measures.get(name)) for one in outcomes] for name in INTERVALS}
    return row | dict(made_with)


_BIAS = ("keep_directive", "keep_defence")


def estimate(values: Sequence[float]) -> Estimate | None:
    """Over prompts: Wilson's interval where each value is a yes or a no, else bootstrap; None without values."""
    if not values:
        return None
    return share([value == 1 for value in values]) if set(values) <= {0, 1} else bootstrap(values)


def key_of(row: Row) -> Key:
    """Which of the parts that ``study`` yields the row belongs to."""
    return row["order"], row["method"], row["spans"]


def append(rows: Iterable[Row], file: Path) -> None:
    """Adds the rows to ``file`` (JSON lines)."""
    try:
        with file.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    except OSError as error:
        raise KeepKVError(f"cannot write to {str(file)!r}: {error.strerror}") from error


def load(file: Path) -> list[Row]:
    """The rows of ``file``; a last line that was cut short is left out, any other is an error."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # behind the last newline stands nothing, or what was cut
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise KeepKVError(f"{file.name}, line {number}: {error}. Delete the file to start again.") from error
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _short(value: float | None) -> float | int | None:
    if value is None:
        return None
    return int(value) if value in (0, 1) else round(value, 4)
