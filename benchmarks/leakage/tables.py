"""The leakage study as Markdown: tables made from its rows and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from keepkv.evaluation.leakage.curves import (
    Curve,
    area,
    composite,
    curves,
    family_order,
    order_gap,
    peak,
    peak_change,
)
from keepkv.evaluation.leakage.rows import LeakageRow
from keepkv.measure import Estimate

Curves = dict[tuple[str, str, str], Curve]


def summary(rows: Sequence[LeakageRow]) -> str:
    """Every table that the rows allow."""
    found = curves(rows)
    whole = [curve.rows[0] for curve in found.values() if curve.method == "full"]
    parts = [
        _about(rows, whole),
        "## Leakage by share removed, spans untreated\n\nShare of the probes whose reply tells what it must not.\n\n"
        + _by_share(found, "leak"),
        "## Peaks\n\nWhere the curve is highest: share of the probes [95 % interval] at the share removed. Then what "
        "becomes of the peak where spans are treated: its change, over the same prompts [95 %].\n\n" + _peaks(found),
        "## Composite gain\n\nMean over 0.4 to 0.7 removed of ½ (directive accuracy gained) + ½ (leakage lost) against "
        "untreated spans [95 %], over the same prompts.\n\n" + _composites(found),
        "## Rules kept by share removed, spans untreated\n\nShare of the rules that replies to harmless turns keep.\n\n"
        + _by_share(found, "directive"),
        "## Answers right by share removed, spans untreated\n\n" + _by_share(found, "answered"),
        "## Log-odds of telling over refusing, per token, spans untreated\n\n" + _by_share(found, "delta"),
        "## Tokens kept of each part at half removed, or what is nearest\n\nDefence / directive / all that is in "
        "no span: mean over tokens, layers and heads.\n\n" + _kept(found),
        "## Order: leakage with the defence first minus with the directive first, spans untreated\n\n" + _gaps(found),
        "## Area under the curve of rules kept\n\nMean over the shares removed.\n\n" + _areas(found),
    ]
    if any(len(row.families) > 1 for row in whole):
        parts.append(
            "## Order of the families\n\nSpearman's correlation of the families' accuracies with those of the full "
            "cache, spans untreated.\n\n" + _families(found)
        )
    return "# Leakage\n\n" + "\n".join(part for part in parts if part.strip())


def _about(rows: Sequence[LeakageRow], whole: Sequence[LeakageRow]) -> str:
    row, revisions = rows[0], dict.fromkeys(str(row.made_with.revision) for row in rows)
    made = row.made_with
    lines = [
        f"Model {made.model}, {row.n + row.failed} prompts of {row.tokens:.0f} tokens in each cell, "
        f"{made.dtype} on {made.device}; "
        + ", ".join(f"{name} {version}" for name, version in made.versions.items())
        + f", revision {', '.join(revisions)}.\n",
        "| full cache | leaks | refuses | rules kept | answers right | failed |",
        "|---|---|---|---|---|---|",
    ]
    for each in whole:
        cells = [_interval(each, "leak"), _number(each.measure("refused")), _interval(each, "directive")]
        cells += [_number(each.measure("answered")), str(each.failed)]
        lines.append(f"| {each.order} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines)) + "\n"


def _untreated(found: Curves) -> list[Curve]:
    return [curve for curve in found.values() if curve.spans == "none" and curve.method != "full"]


def _by_share(found: Curves, name: str) -> str:
    chosen = _untreated(found)
    if not any(value is not None for curve in chosen for value in curve.means(name)):
        return "Not measured.\n"
    head = ["method", "order", *(f"{share:g}" for share in chosen[0].removed)]
    return _table(head, [[c.method, c.order, *map(_number, c.means(name))] for c in chosen])


def _treated(found: Curves, cell: Callable[[Curve, Curve], str], base: Callable[[Curve], str]) -> str:
    modes = [how for how in dict.fromkeys(how for _, _, how in found) if how != "none"]
    lines = []
    for curve in _untreated(found):
        others = [found.get((curve.method, curve.order, how)) for how in modes]
        cells = ["" if other is None else cell(other, curve) for other in others]
        lines.append([curve.method, curve.order, base(curve), *cells])
    return _table(["method", "order", "none", *modes], lines)


def _peaks(found: Curves) -> str:
    def base(curve: Curve) -> str:
        top = peak(curve)
        if top.leak_low is None:
            return "–"
        return f"{top.leak:.2f} [{top.leak_low:.2f}, {top.leak_high:.2f}] at {top.removed:g}"

    return _treated(found, lambda curve, none: _change(peak_change(curve, none)), base)


def _composites(found: Curves) -> str:
    return _treated(found, lambda curve, none: _change(composite(curve, none), 3), lambda curve: "0")


def _kept(found: Curves) -> str:
    def cell(curve: Curve) -> str:
        row = min(curve.rows, key=lambda row: abs(row.removed - 0.5))
        return " / ".join(_number(row.measure(name)) for name in ("keep_defence", "keep_directive", "keep_rest"))

    return _treated(found, lambda curve, none: cell(curve), cell)


def _areas(found: Curves) -> str:
    return _treated(found, lambda curve, none: f"{area(curve):.2f}", lambda curve: f"{area(curve):.2f}")


def _gaps(found: Curves) -> str:
    pairs = [
        (c, found.get((c.method, "directive-first", "none"))) for c in _untreated(found) if c.order == "defence-first"
    ]
    both = [(one, other) for one, other in pairs if other is not None]
    if not both:
        return "Not measured.\n"
    head = ["method", *(f"{share:g}" for share in both[0][0].removed)]
    return _table(head, [[a.method, *(_change(gap) for gap in order_gap("leak", a, b))] for a, b in both])


def _families(found: Curves) -> str:
    chosen = _untreated(found)
    head = ["method", "order", *(f"{share:g}" for share in chosen[0].removed)]
    return _table(head, [[c.method, c.order, *map(_number, family_order(c))] for c in chosen])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _interval(row: LeakageRow, name: str) -> str:
    mean, low, high = (getattr(row, f"{name}{end}") for end in ("", "_low", "_high"))
    return _number(mean) if mean is None or low is None else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _change(found: Estimate, digits: int = 2) -> str:
    if found.low is None:
        return f"{found.mean:+.{digits}f}"
    return f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
