"""Runs a grid: a row for everything that is planned, whatever becomes of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from keepkv.characterize.grid.levels import Point
from keepkv.characterize.grid.plan import Plan, plan
from keepkv.characterize.grid.possible import refusal
from keepkv.characterize.grid.read import Grid
from keepkv.characterize.record import folder as folders
from keepkv.characterize.record.rows import PointRow, RequestRow, ResultRow
from keepkv.characterize.record.summary import point_metrics, summarise
from keepkv.core.plugins import imported
from keepkv.errors import KeepKVError
from keepkv.measure.alone import alone
from keepkv.measure.environment import MadeWith, revision, versions
from keepkv.measure.environment import imports as imports_made
from keepkv.measure.files import folder as make_folder
from keepkv.measure.machine import machine
from keepkv.measure.session import RowFailed, Session

Step = Callable[[int, str], None]  # points done, and what comes next
COMMAND = [sys.executable, "-m", "keepkv.characterize.drive.worker"]


def characterize(
    grid: Grid, out: str | Path, step: Step = lambda points, what: None, *, only: Iterable[Point] | None = None,
    command: list[str] | None = None, until: float | None = None,
) -> list[ResultRow]:  # fmt: skip
    """Measures what of ``grid`` is not yet recorded in ``out`` and returns the results, which are written there too.

    A point that fails is a row with its status, and the others go on. only: instead of the points that the grid plans,
    in order. command: of the process of a point. until: of ``time.monotonic``; no point is begun after it. Raises
    ``KeepKVError`` where ``out`` holds another grid, where another process writes to it, and where nothing can be run.
    """
    made: Plan = plan(grid, partial(refusal, grid)) if only is None else Plan(tuple(only), ())
    if not made.points:
        why = f", the first because {made.dropped[0][1]}" if made.dropped else ""
        raise KeepKVError(f"nothing of the grid can be run here: {len(made.dropped)} points are dropped{why}")
    where = make_folder(out)
    dropped = [
        {"application": p.application.name, "workload": p.workload.label, "technique": p.technique.label,
         "weights": p.weights, "hardware": p.hardware.label, "why": why}
        for p, why in made.dropped
    ]  # fmt: skip
    with alone(where):
        folders.begin(where, grid.to_dict(), dropped)
        done, commit = folders.done(where), revision()
        left = [(point, digest) for point in made.points if (digest := point.digest(grid.setting())) not in done]
        step(len(made.points) - len(left), "")
        for point, digest in left:
            if until is not None and time.monotonic() > until:
                break
            step(0, f"{point.choice}, {point.workload.label}")
            row, requests = _point(grid, point, digest, command or COMMAND)
            row = replace(row, made_with=replace(row.made_with, revision=commit))
            if row.status == "ok":
                found = folders.Run(where, grid.to_dict(), requests={digest: requests})
                row = replace(row, metrics=point_metrics(row, found))
            folders.add(where, row, requests)
            step(1, "")
        return summarise(where)


def _point(grid: Grid, point: Point, digest: str, command: list[str]) -> tuple[PointRow, list[RequestRow]]:
    """The rows of one point, in a process of its own."""
    row = _empty(grid, point, digest)
    spec = {
        "point": point.to_dict(), "digest": digest, "setting": grid.setting(),
        "imports": [str(one.path) for one in imported()],
    }  # fmt: skip
    session: Session | None = None
    try:
        session = Session(command, spec, group=True)
        answer = session.answer(within=grid.timeout)
    except RowFailed as error:
        return replace(row, status=error.how, error=" ".join(str(error).split())), []
    finally:
        if session is not None:
            session.close()
    return _filled(row, answer)


def _filled(row: PointRow, answer: dict[str, Any]) -> tuple[PointRow, list[RequestRow]]:
    requests = [RequestRow.from_dict(one, "a request") for one in answer.pop("requests")]
    made = answer.pop("made_with")
    known = {name: made[name] for name in ("model", "device", "dtype", "versions") if made.get(name) is not None}
    counted = [one for one in requests if one.number >= 0]
    full = replace(
        row, **answer, made_with=replace(row.made_with, **known),
        requests=len(counted), failed=sum(one.status == "failed" for one in counted),
        cut=sum(one.status == "cut" for one in counted),
    )  # fmt: skip
    if counted and full.failed == len(counted):
        return replace(full, status="error", error=counted[0].error), requests
    return full, requests


def _empty(grid: Grid, point: Point, digest: str) -> PointRow:
    made_with = MadeWith(
        model=grid.model, device=point.hardware.device, dtype=point.hardware.dtype, versions=versions(),
        imports=imports_made(),
    )  # fmt: skip
    name = machine(torch.device(point.hardware.device)) if point.hardware.device in ("cpu", "cuda") else ""
    return PointRow(
        point=digest, status="ok", role=point.role, application=point.application.name, workload=point.workload.label,
        technique=point.technique.label, weights=point.weights, hardware=point.hardware.label, seed=point.seed,
        block=point.block, spec=point.to_dict(), made_with=made_with, machine=name,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )  # fmt: skip
