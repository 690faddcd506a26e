"""The report of a run directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from keepkv.characterize.analyse.pareto import axes_of
from keepkv.characterize.analyse.recommend import AXES, by_place, recommend
from keepkv.characterize.record.folder import Run, read
from keepkv.characterize.record.rows import ResultRow
from keepkv.characterize.record.summary import DRIFT, Choice, choices, drift
from keepkv.errors import KeepKVError
from keepkv.report.characterization.figures import drawn
from keepkv.report.characterization.output import Pages, Section
from keepkv.report.characterization.words import NOTHING, made_with, measured, shown

COLUMNS = {
    "score": "score", "score lost": "score_drop", "worst family": "worst_drop", "right to wrong": "lost",
    "reply length": "length_ratio", "asked": "ratio_asked", "held": "ratio", "bytes per token": "kv_bytes_per_token",
    "peak": "peak_bytes", "first token p50": "ttft_p50", "first token p95": "ttft_p95", "queue p50": "queue_p50",
    "per token p50": "tpot_p50", "per token p95": "tpot_p95", "end to end p95": "e2e_p95",
    "compressing": "compress_share", "tokens/s": "output_per_s", "requests/s": "requests_per_s",
    "goodput/s": "goodput_per_s", "J/token": "j_per_output_token", "J/correct": "j_per_correct",
}  # fmt: skip
BUSY = 1.5  # processes a core, of which one may be the measurement
FEW = 20  # requests of a point, below which its percentiles and intervals say little


def run_pages(folder: str | Path, axes: Sequence[str] = AXES) -> Pages:
    """The document of the run in ``folder``: a table and figures for each place, what is recommended there, and what
    failed."""
    run = read(folder)
    found = choices(run)
    if not found:
        raise KeepKVError(f"{str(folder)!r} holds no finished point: run keepkv characterize to its end")
    sections = [_place(place, held, axes) for place, held in by_place(found).items()]
    measured_at = [point for point in run.points if point.status == "ok"]
    facts = made_with(measured_at or run.points) | {"Points": f"{len(measured_at)} of {len(run.points)} finished"}
    return Pages(
        "What it costs and what it is worth",
        "Speed, energy and quality of the same requests with each way to hold the cache. Every number has its 95 % "
        f"interval, where there is one; {NOTHING} is what was not measured.",
        facts, tuple(notes(run)), (*sections, *_figures(found, axes), *_failures(run)),
    )  # fmt: skip


def notes(run: Run) -> list[str]:
    """What to know before believing the numbers."""
    found = []
    moved = {name: share for name, share in drift(run.points).items() if abs(share) > DRIFT}
    if moved:
        said = ", ".join(f"{name} by {100 * share:+.1f} %" for name, share in moved.items())
        found.append(f"Drift: the baseline moved from the start of the run to its end, {said}. Compare within blocks.")
    elif not drift(run.points):
        found.append("Drift is not known: the baseline was not measured at both ends of the run.")
    busy = [point for point in run.points if point.state.get("load", 0) > BUSY * point.state.get("cores", 1)]
    if busy:
        found.append(
            f"Others used the machine: at {len(busy)} of {len(run.points)} points more than {BUSY:g} processes a core "
            "ran or waited. Times and throughput of such a run say little."
        )
    scores = [point.metrics.get("score") for point in run.points if point.is_baseline and point.status == "ok"]
    if any(score is not None for score in scores) and not any(scores):
        found.append(
            "The full cache answers nothing, so scores say nothing of compression: ask what this model can do, and "
            "let its replies be long enough."
        )
    counts = [point.requests for point in run.points if point.status == "ok" and point.imported is None]
    if counts and min(counts) < FEW:
        found.append(f"As few as {min(counts)} requests a point: percentiles and intervals of so few say little.")
    if not any(point.joules is not None for point in run.points):
        why = Counter(point.energy_why for point in run.points if point.energy_why)
        found.append(f"Energy was not measured: {why.most_common(1)[0][0] if why else 'no meter'}.")
    elif any(point.energy_quality == "low" for point in run.points):
        found.append("Energy of some windows is of low quality: they were short, or the counter moved seldom.")
    if any(point.unstable for point in run.points):
        found.append("Where the queue grew through the window, times depend on its length; such rows are never picked.")
    if any(point.warm == "limit" for point in run.points):
        found.append("Some windows began before times were flat: give more requests to warm up.")
    return found


def _place(place: tuple[str, str, str], held: Sequence[Choice], axes: Sequence[str]) -> Section:
    rows = tuple(
        (row.choice + (" (queue grew)" if row.unstable else ""), *(measured(row, name) for name in COLUMNS.values()))
        for row in (one.row for one in held)
        if row.status == "ok"
    )
    return Section(", ".join(shown(place)), _words(held, axes), ("choice", *COLUMNS), rows)


def _words(held: Sequence[Choice], axes: Sequence[str]) -> str:
    try:
        found = recommend(held, axes_of(axes))
    except KeepKVError as error:
        return f"No recommendation: {error}."
    if found.pick is None:
        return f"No recommendation: {found.why}."
    front = ", ".join(_front(held, axes))
    return f"On the front of {', '.join(axes)}: {front}. Of these, {found.pick.choice} is {found.why}."


def _front(held: Sequence[Choice], axes: Sequence[str]) -> list[str]:
    """Choices on the front; none where nothing can be recommended."""
    try:
        return [one.name for one in recommend(held, axes_of(axes)).standings if one.on_front]
    except KeepKVError:  # not measured on these axes
        return []


def _figures(found: Sequence[Choice], axes: Sequence[str]) -> list[Section]:
    """Figures of each application and machine: its workloads are points of one line."""
    groups: dict[tuple[str, str], list[ResultRow]] = {}
    front = {(place, name) for place, held in by_place(found).items() for name in _front(held, axes)}
    for one in found:
        if one.row.status == "ok":
            groups.setdefault((one.row.application, one.row.hardware), []).append(one.row)
    made = []
    for (application, hardware), rows in groups.items():
        if figures := drawn(rows, front):
            words = "Lines join the budgets, or the loads, of one method; a ring is on the front of its place."
            made.append(Section(f"Figures: {application}, {hardware}", words, figures=tuple(figures)))
    return made


def _failures(run: Run) -> list[Section]:
    failed = tuple(
        (point.choice, *shown(point.place[:2]), point.status, point.error or "")
        for point in run.points
        if point.status != "ok"
    )
    dropped = tuple((one["technique"], one["weights"], one["workload"], one["why"]) for one in run.dropped)
    made = []
    if failed:
        made.append(Section("What failed", "", ("choice", "application", "workload", "status", "why"), failed, 5))
    if dropped:
        words = "Left out of the plan, for it cannot be run here."
        made.append(Section("What was dropped", words, ("method", "weights", "workload", "why"), dropped, 4))
    return made
