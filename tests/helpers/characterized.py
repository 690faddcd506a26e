"""Made-up runs of ``keepkv characterize``: rows of the real schema, without measuring anything."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from keepkv.characterize.grid.levels import Application, Hardware, Point, Technique, Workload
from keepkv.characterize.grid.read import Grid, Phases
from keepkv.characterize.record import folder as folders
from keepkv.characterize.record.resample import Samples
from keepkv.characterize.record.rows import PointRow, RequestRow, ResultRow
from keepkv.characterize.record.summary import Choice, point_metrics
from keepkv.measure.environment import MadeWith
from keepkv.measure.interval import Estimate

MADE = MadeWith(model="made up", device="cpu", dtype="float32", versions={"torch": "2.13.0"}, revision="0123456789ab")
APPLICATION = Application("facts", tasks=("niah-single-1",))


def timeline(
    number: int = 0, arrive: float = 0.0, admit: float | None = None, times: Sequence[float] = (), **more: Any
) -> RequestRow:
    """One request, answered where it has times."""
    known = {"status": "ok" if times else "cut", "end": times[-1] if times else None, "n_out": len(times) or None}
    return RequestRow(point="p", number=number, arrive=arrive, admit=admit, times=list(times), **{**known, **more})


def point_row(point: Point, digest: str = "p", **more: Any) -> PointRow:
    known: dict[str, Any] = {
        "status": "ok",
        "window_s": 10.0,
        "warm": "flat",
        "made_with": MADE,
        "machine": "a machine",
    }
    return PointRow(
        point=digest, role=point.role, application=point.application.name, workload=point.workload.label,
        technique=point.technique.label, weights=point.weights, hardware=point.hardware.label, seed=point.seed,
        block=point.block, spec=point.to_dict(), time="2026-01-01T00:00:00+00:00", **{**known, **more},
    )  # fmt: skip


def result(choice: str = "snapkv @ 0.5", workload: str = "closed 2, 512 in", **metrics: Any) -> ResultRow:
    """A row of results whose metrics are numbers, or tuples of value, low, high."""
    made = {
        name: None if x is None else Estimate(*x) if isinstance(x, tuple) else Estimate(x, x, x)
        for name, x in metrics.items()
    }
    return ResultRow(
        application="facts", workload=workload, hardware="cpu", technique=choice, weights="none", seeds=[0],
        points=["p"], metrics=made,
    )  # fmt: skip


def choice(name: str, seed: int = 0, n: int = 40, noise: float = 0.01, **metrics: float) -> Choice:
    """A choice whose samples lie around the given means."""
    rng = random.Random(seed)
    held = {
        metric: Samples(tuple(mean + rng.gauss(0, noise) for _ in range(n)), tuple((0, 0, i) for i in range(n)))
        for metric, mean in metrics.items()
    }
    row = replace(result(name), metrics={metric: one.estimate() for metric, one in held.items()})
    return Choice(row, held)


def grid(**more: Any) -> Grid:
    """A small grid that plans fast."""
    known: dict[str, Any] = {
        "applications": (APPLICATION,), "workloads": (Workload(concurrency=2),), "hardware": (Hardware(),),
        "techniques": (Technique("snapkv", 0.5), Technique("keepkv", 0.25)),
        "phases": Phases(warm_least=2, warm_most=3, seconds=0.2, requests=2, most_seconds=5.0, idle=0.0),
    }  # fmt: skip
    return Grid(**{**known, **more})


Score = Callable[[str, int], float]


def made_up_run(folder: Path, requests: int = 24, joules: float | None = None) -> Path:
    """A run directory: the full cache and two methods, closed loops of two sizes and open loops of two rates."""
    loads = (
        Workload(concurrency=1),
        Workload(concurrency=4),
        Workload("poisson", rate=1.0),
        Workload("poisson", rate=2.0),
    )
    asked = grid(workloads=loads, limits={"ttft": 1.0})
    folder.mkdir(parents=True, exist_ok=True)
    folders.begin(folder, asked.to_dict(), [])
    speed = {"full": 1.0, "snapkv": 0.8, "keepkv": 0.9}
    share = {"full": 1.0, "snapkv": 0.5, "keepkv": 0.25}
    order = 0
    for load in loads:
        for technique in (Technique(), *asked.techniques):
            name, rng = technique.method, random.Random(f"{technique.label}{load.label}")
            role = "baseline" if name == "full" else "point"
            point = Point(APPLICATION, load, technique, "none", Hardware(), role=role)
            digest, rows = f"point{order}", []
            for i in range(requests):
                at = 10.0 * i / requests
                step = 0.01 * speed[name] * (1 + 0.1 * rng.random())
                times = [at + 0.1 * speed[name] + k * step for k in range(8)]
                right = name != "snapkv" or i % 4 > 0
                made = timeline(
                    i, at, at + 0.01, times, family="niah", n_in=500, cached=0, score=float(right),
                    reply="7" if right else "8", kv_full=1e6, kv_bytes=1e6 * share[name],
                    kv_logical=0.9e6 * share[name], kv_tokens=500.0, compress_s=0.0 if name == "full" else 0.01,
                )  # fmt: skip
                rows.append(replace(made, point=digest))
            spent = None if joules is None else joules * speed[name] * (load.rate or 1.0)
            source, quality = ("none", "none") if spent is None else ("nvml-counter", "good")
            row = point_row(
                point, digest, requests=requests, joules=spent, energy_source=source, energy_quality=quality,
                peak_bytes=500_000_000, unstable=None if load.arrivals == "closed" else False,
                energy_why="no RAPL here" if spent is None else None,
            )  # fmt: skip
            run = folders.Run(folder, asked.to_dict(), requests={digest: rows})
            folders.add(folder, replace(row, metrics=point_metrics(row, run)), rows)
            order += 1
    return folder
