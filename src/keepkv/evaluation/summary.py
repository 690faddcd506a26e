"""Cells: what the items of one task, length, mode, method and budget say together, with intervals."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from keepkv.errors import KeepKVError
from keepkv.evaluation.ledger import CELLS, ITEMS, RUN, SPEED, read_lines
from keepkv.evaluation.records import KEY, Record, cell_of
from keepkv.metrics import bootstrap


def summarise(folder: Path) -> list[Record]:
    """The cells of the evaluation in ``folder``, written to ``cells.jsonl`` and ``cells.csv``."""
    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KeepKVError(f"{str(folder)!r} holds no evaluation: {error}") from error
    items = list(read_lines(folder, ITEMS))
    speed = list(read_lines(folder, SPEED))
    made_with = {"seed": run["seeds"], **run["environment"]}
    found = [made_with | cell for cell in cells(items, speed)]
    (folder / CELLS).write_text("".join(json.dumps(cell) + "\n" for cell in found), encoding="utf-8")
    if found:
        with (folder / CELLS).with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            flat = [{**cell, **cell["versions"], "seed": " ".join(map(str, cell["seed"]))} for cell in found]
            columns = dict.fromkeys(key for row in flat for key in row if key != "versions")
            writer = csv.DictWriter(file, list(columns), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(flat)
    return found


def cells(items: Iterable[Record], speed: Iterable[Record]) -> list[Record]:
    """One record per cell, in the order of their first rows.

    score, low, high: mean over items and its 95 % bootstrap interval. minus_full: the paired difference to the full
    cache on the same items. n: items that were scored; questions: of all of them; failed: items that were not.
    """
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for row in items:
        groups[cell_of(row)].append(row)
    times: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for row in speed:
        times[cell_of(row)].append(row)
    full = {(*key[:3], row["seed"]): row["score"] for key, rows in groups.items() if key[3] == "full" for row in rows}
    return [_cell(key, rows, full, times[key]) for key, rows in groups.items()]


def _cell(key: tuple[Any, ...], rows: list[Record], full: dict[tuple[Any, ...], Any], times: list[Record]) -> Record:
    scored = [row for row in rows if row["error"] is None]
    cell: Record = dict(zip(KEY, key, strict=True))
    cell |= {
        "n": len(scored),
        "questions": sum(len(row["scores"]) for row in scored),
        "failed": len(rows) - len(scored),
    }
    cell |= _interval("score", [row["score"] for row in scored])
    pairs = [(row["score"], full.get((*key[:3], row["seed"]))) for row in scored]
    cell |= _interval("minus_full", [mine - theirs for mine, theirs in pairs if theirs is not None])
    for name in ("ratio", "bytes", "full_bytes", "slots", "tokens"):
        cell[name] = sum(row[name] for row in scored) / len(scored) if scored else None
    leaks = [leaked for row in scored for leaked in row["leaked"]]
    cell["leaked"] = sum(leaks) / len(leaks) if leaks else None
    cell["peak_bytes"] = max((row["peak_bytes"] for row in times if row["peak_bytes"] is not None), default=None)
    for name, tokens, seconds in (
        ("read_per_s", "tokens_read", "prefill_s"),
        ("written_per_s", "tokens_written", "answer_s"),
    ):
        spent = sum(row[seconds] for row in times)
        cell[name] = sum(row[tokens] for row in times) / spent if spent else None
    errors = [row["error"] for row in rows if row["error"] is not None]
    own = {"versions": rows[0]["versions"]} if "versions" in rows[0] else {}  # of a peer, in an environment of its own
    return cell | {"error": errors[0] if errors else None} | own


def _interval(name: str, values: list[float]) -> Record:
    names = (name, "low", "high") if name == "score" else (name, f"{name}_low", f"{name}_high")
    if not values:
        return dict.fromkeys(names)
    found = bootstrap(values)
    return dict(zip(names, (found.mean, found.low, found.high), strict=True))
