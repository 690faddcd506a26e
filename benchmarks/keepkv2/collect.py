"""From the folders of a study to one compact file: a line per cell with the numbers of its items, without replies."""

from __future__ import annotations

import gzip
import json
import platform
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from keepkv.evaluation.rows import ITEMS, RUN
from keepkv.measure.files import read_lines

from .plan import bare

Record = dict[str, Any]
CELLS = "cells.jsonl.gz"
CELL = ("model", "part", "task", "length", "mode", "method", "budget")
VALUES = ("score", "output_error", "kl", "answer_kl")  # one for each item, None where it failed


def collect(work: Path) -> tuple[list[Record], Record]:
    """The cells of all that was run in ``work``, finished or not, and what it was run with."""
    cells, runs = [], []
    models = json.loads((work / "models.json").read_text())
    for path in sorted(work.glob(f"*/*/*/{RUN}")):
        run = json.loads(path.read_text())
        run["budgets"] = [bare(one) for one in run["budgets"]]
        place = {"model": run["model"], "part": path.parts[-3]}
        runs.append(run | place)
        cells += compact(place | row | {"budget": bare(row["budget"])} for row in read_lines(path.parent, ITEMS))
    return cells, _summary(runs, models, work, sum(cell["failed"] for cell in cells))


def compact(rows: Iterable[Record]) -> list[Record]:
    """One record per cell: seeds and values of its items, means of the measured sizes."""
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in CELL)].append(row)
    return [dict(zip(CELL, key, strict=True)) | _values(mine) for key, mine in groups.items()]


def _values(rows: list[Record]) -> Record:
    found: Record = {"seeds": [row["seed"] for row in rows], "failed": sum(row["error"] is not None for row in rows)}
    for name in VALUES:
        if any(row.get(name) is not None for row in rows):
            found[name] = [_short(row.get(name)) for row in rows]
    if any("layers" in row for row in rows):
        found["layers"] = [[_short(value) for value in row.get("layers", ())] for row in rows]
    for name in ("ratio", "slots"):
        held = [row[name] for row in rows if row.get(name) is not None]
        found[name] = _short(sum(held) / len(held)) if held else None
    errors = [row["error"] for row in rows if row["error"] is not None]
    return found | ({"error": errors[0]} if errors else {})


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _summary(runs: list[Record], models: Record, work: Path, failed: int) -> Record:
    parts: Record = {}
    for run in runs:
        part = parts.setdefault(run["part"], {"sinks": run["sinks"], "window": run["window"], "items": {}})
        part["items"] |= dict.fromkeys(run["tasks"], run["items"])
        for key in ("models", "lengths", "modes", "methods", "budgets"):
            held = run[key] if key != "models" else [run["model"]]
            part[key] = list(dict.fromkeys([*part.get(key, []), *held]))
    environments = [run["environment"] for run in runs]
    spent = json.loads(path.read_text()) if (path := work / "seconds.json").exists() else {}
    return {
        "models": models,  # and the seed of their items
        "environments": [one for i, one in enumerate(environments) if one not in environments[:i]],
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
        "core_seconds": {p: round(sum(s for where, s in spent.items() if f"/{p}/" in where)) for p in parts},
        "failed": failed,
        "parts": parts,
    }


def write(out: Path, cells: list[Record], run: Record) -> None:
    """Both files of a study."""
    out.mkdir(parents=True, exist_ok=True)
    (out / RUN).write_text(json.dumps(run, indent=1) + "\n")
    with gzip.GzipFile(out / CELLS, "wb", mtime=0) as file:
        file.write("".join(json.dumps(cell, separators=(",", ":")) + "\n" for cell in cells).encode())


def read(out: Path) -> tuple[list[Record], Record]:
    """What ``write`` wrote."""
    return list(read_lines(out, CELLS.removesuffix(".gz"))), json.loads((out / RUN).read_text())
