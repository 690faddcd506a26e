"""What a run says: for each choice at each place, every metric with its interval."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from keepkv.characterize.record.folder import Run, read
from keepkv.characterize.record.names import METRICS
from keepkv.characterize.record.resample import Samples
from keepkv.characterize.record.rows import POINTS, RESULTS, PointRow, ResultRow
from keepkv.characterize.record.samples import paired, samples
from keepkv.measure.files import write, write_table

DRIFT = 0.03  # of the baseline, from the start of a run to its end, that is said
DRIFTS = ("tpot_mean", "ttft_mean", "output_per_s")


@dataclass(frozen=True)
class Choice:
    """One choice at one place, as analysis compares it: its row, and the samples behind each metric."""

    row: ResultRow
    samples: dict[str, Samples]


def choices(run: Run) -> list[Choice]:
    """Every choice at every place, baselines first among theirs. Runs of the start and the end of a run count for drift
    alone."""
    groups: dict[tuple[tuple[str, str, str], str], list[PointRow]] = defaultdict(list)
    for point in run.points:
        if point.role not in ("start", "end"):
            groups[point.place, point.choice].append(point)
    bases = {
        place: [one for one in points if one.status == "ok"]
        for (place, _), points in groups.items()
        if points[0].is_baseline
    }
    ordered = sorted(groups.items(), key=lambda item: (list(groups).index(item[0]), not item[1][0].is_baseline))
    return [_choice(points, bases.get(place, []), run) for (place, _), points in ordered]


def summarise(folder: str | Path) -> list[ResultRow]:
    """The results of the run in ``folder``, written to ``results.jsonl`` and ``results.csv``, beside ``points.csv``."""
    run = read(folder)
    found = [choice.row for choice in choices(run)]
    write(found, run.folder, RESULTS.partition(".")[0])
    write_table(run.points, run.folder / f"{POINTS.partition('.')[0]}.csv")
    return found


def drift(points: Sequence[PointRow]) -> dict[str, float]:
    """How far the baseline moved from the start of a run to its end, as a share, by metric; empty where either end is
    missing."""
    ends = {point.role: point.metrics for point in points if point.role in ("start", "end") and point.status == "ok"}
    if len(ends) < 2:
        return {}
    found = {}
    for name in DRIFTS:
        before, after = ends["start"].get(name), ends["end"].get(name)
        if before and after:
            found[name] = after / before - 1
    return found


def point_metrics(point: PointRow, run: Run) -> dict[str, float | None]:
    """Every metric of one point by itself; None where it was not measured."""
    found = samples([point], run.requests, run.limits)
    return {name: found[name].point if name in found else None for name in METRICS}


def _choice(points: list[PointRow], bases: Sequence[PointRow], run: Run) -> Choice:
    first, good = points[0], [point for point in points if point.status == "ok"]
    held = samples(good, run.requests, run.limits)
    against, worst = paired(good, bases, run.requests)
    held |= against
    bad = [point for point in points if point.status != "ok"]
    known = [point.unstable for point in good if point.unstable is not None]
    row = ResultRow(
        application=first.application, workload=first.workload, hardware=first.hardware, technique=first.technique,
        weights=first.weights, seeds=sorted({point.seed for point in points}), points=[point.point for point in points],
        failed=len(bad), status="ok" if good else bad[0].status, unstable=any(known) if known else None,
        energy_source=good[0].energy_source if good else "none",
        energy_quality=good[0].energy_quality if good else "none", worst_family=worst,
        metrics={name: held[name].estimate() if name in held else None for name in METRICS},
        error=bad[0].error if bad else None,
    )  # fmt: skip
    return Choice(row, held)
