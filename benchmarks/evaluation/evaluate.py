"""Every method × budget × task on the embedded model, with the tables and the page that come of it.

    python -m benchmarks.evaluation.evaluate --work DIRECTORY [--workers 2] [--share 1.0] [--out DIRECTORY]
    python -m benchmarks.evaluation.evaluate --work DIRECTORY --add kvzip compactor
    python -m benchmarks.evaluation.evaluate --work DIRECTORY --methods keepkv2 kvzip --out DIRECTORY

Runs ``keepkv eval`` once per group of tasks, as many at a time as there are workers; each resumes what an earlier call
left unfinished in ``--work``. Then joins them, sums up, and writes what belongs under version control to ``--out``.
``--share`` scales the number of items. Hours on two cores. ``--add`` runs these methods alone and joins them with the
rows that are there: the full cache, random and snapkv run again beside them and must score every item as before, to
rounding.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keepkv.evaluation.rows import CELLS, ITEMS, MAPS, RUN, SPEED, Run
from keepkv.evaluation.summary import summarise
from keepkv.measure.files import read_lines

from .modes import key_modes
from .scores import peers, tables

METHODS = (
    "random", "streaming-llm", "knorm", "keydiff", "snapkv", "pyramidkv", "h2o", "tova", "expected-attention", "adakv",
    "adakv:score=keydiff", "cam", "d2o", "keepkv", "keepkv:key=bias", "keepkv:key=zip", "keepkv:key=code",
    "keepkv:score=snapkv", "keepkv:score=snapkv,key=zip", "keepkv:score=snapkv,threshold=none", "keepkv2", "compactor",
    "kvzip", "g-kv", "r-kv", "attention-matching", "grkv", "reskv",
)  # fmt: skip
# Their statistics take every query of every prompt: with a prompt per question, hours.
CHEAP = tuple(name for name in METHODS if name not in ("cam", "d2o"))
AGREEMENT = "agreement-kvpress.json"
Record = dict[str, Any]
ROUNDING = 1e-5
BUDGETS = ("5%bytes", "10%bytes", "20%bytes", "50%bytes", "1.0")
SLOTS = ("32", "64", "128")  # of replies that grow: a fixed memory, whatever has been seen


@dataclass(frozen=True)
class Part:
    """One call of ``keepkv eval``. items: contexts of each task; a context has 1 to 8 questions."""

    name: str
    tasks: tuple[str, ...]
    items: int
    mode: str = "agnostic"
    lengths: tuple[int, ...] = (1024,)
    budgets: tuple[str, ...] = BUDGETS
    methods: tuple[str, ...] = METHODS

    def arguments(self, share: float) -> list[str]:
        """As the command line takes them."""
        words = ["--items", str(max(2, round(self.items * share))), "--mode", self.mode]
        for flag, values in (("-t", self.tasks), ("-l", self.lengths), ("-b", self.budgets), ("-m", self.methods)):
            words += [word for value in values for word in (flag, str(value))]
        return words


EIGHT = ("niah-multikey-1", "niah-multikey-2", "niah-multikey-3", "qa-1", "qa-2")
FOUR = ("niah-multivalue", "niah-multiquery", "variable-tracking", "shared-context")
TWO = ("secret",)
ONE = ("niah-single-1", "niah-single-2", "niah-single-3", "common-words", "frequent-words")
PARTS = (
    Part("agnostic-8", EIGHT, 20),
    Part("agnostic-1", ONE, 64),
    Part("agnostic-4", FOUR, 40),
    Part("agnostic-2", TWO, 80),
    Part("aware-8", EIGHT, 5, "aware", methods=CHEAP),
    Part("aware-4", FOUR[:3], 10, "aware", methods=CHEAP),
    Part("aware-1", ONE, 20, "aware", methods=CHEAP),
    Part("aware-2", TWO, 20, "aware", methods=CHEAP),
    Part("long", ("long-decode",), 8, lengths=(96,), budgets=SLOTS),
    Part("needle", ("needle",), 22, lengths=(512, 1024, 2048)),
    Part("prose", ("perplexity",), 32),
    Part("rules", ("multi-instruction",), 8),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="unfinished runs are kept and resumed here")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--share", type=float, default=1.0, help="of the items of each part")
    parser.add_argument("--parts", nargs="*", help="only these")
    parser.add_argument("--add", nargs="+", metavar="METHOD", help="run these alone and keep the rows in --out")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="run these alone, an evaluation of its own")
    parser.add_argument("--budgets", nargs="+", help="only these, where shares are asked for")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    a = parser.parse_args()
    parts = [part for part in PARTS if not a.parts or part.name in a.parts]
    if alone := a.add or a.methods:
        parts = [replace(part, methods=tuple(alone)) for part in parts]
    if a.budgets:
        parts = [replace(part, budgets=tuple(a.budgets)) if part.budgets == BUDGETS else part for part in parts]
    with ThreadPoolExecutor(a.workers) as pool:
        list(pool.map(lambda part: run(part, a.work / part.name, a.share), parts))
    join([a.work / part.name for part in parts], a.out, kept=bool(a.add))


def run(part: Part, folder: Path, share: float) -> None:
    """Runs or resumes one part on one core."""
    words = [sys.executable, "-m", "keepkv.cli", "eval", *part.arguments(share), "--out", str(folder), "--json"]
    done = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    print(f"{part.name}: {'done' if done.returncode == 0 else done.stderr.strip()}", flush=True)


def join(parts: list[Path], out: Path, kept: bool = False) -> None:
    """One evaluation of all parts in ``out``: rows compressed and without the replies, which can be made again. kept:
    beside the rows that are there; what both have must have the same score, and stays as it is."""
    out.mkdir(parents=True, exist_ok=True)
    runs = [json.loads((part / RUN).read_text()) for part in parts]
    held = json.loads((out / RUN).read_text()) if kept else None
    named = Run.from_dict(held).named if held else lambda budget: budget
    merged = [held | {"budgets": [named(one) for one in held["budgets"]]}, *runs] if held else runs
    whole = merged[0] | {
        key: list(dict.fromkeys(value for run in merged for value in run[key]))
        for key in ("tasks", "lengths", "modes", "methods", "budgets")
    }
    whole["items"] = max(run["items"] for run in merged)
    described = [
        {key: run[key] for key in ("tasks", "modes", "lengths", "budgets", "items", "methods")} for run in runs
    ]
    whole["parts"] = [*(held["parts"] if held else []), *described]
    whole["shares"] = "tokens"
    for name in (ITEMS, SPEED, MAPS):
        rows = [row for part in parts for row in read_lines(part, name)]
        if name == ITEMS:
            rows = [row | {"replies": []} for row in rows]
        if name == MAPS:  # a picture of each method is enough
            rows = [row for row in rows if row["task"] in ("niah-multikey-1", "secret")]
            rows = [row for row in rows if row["budget"] in ("10%bytes", "20%bytes") and row["mode"] == "agnostic"]
        if held:
            versions = runs[0]["environment"]["versions"]
            other = {"versions": versions} if name == ITEMS and versions != held["environment"]["versions"] else {}
            earlier = [row | {"budget": named(row["budget"])} for row in read_lines(out, name)]
            rows = beside(earlier, [row | other for row in rows], name)
        with gzip.GzipFile(out / f"{name}.gz", "wb", mtime=0) as file:
            file.write("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode())
    (out / RUN).write_text(json.dumps(whole, indent=1) + "\n")
    if not held:
        agreement = {part.name: json.loads(path.read_text()) for part in parts if (path := part / AGREEMENT).exists()}
        (out / AGREEMENT).write_text(json.dumps(agreement, indent=1) + "\n")
    (out / f"{CELLS}.gz").unlink(missing_ok=True)
    summarise(out)
    cells = list(read_lines(out, CELLS))
    items = list(read_lines(out, ITEMS))
    (out / f"{CELLS}.gz").write_bytes(gzip.compress((out / CELLS).read_bytes(), mtime=0))
    for path in (out / CELLS, (out / CELLS).with_suffix(".csv")):
        path.unlink()
    (out / "scores.md").write_text(tables(cells, items, whole))
    (out / "kvpress.md").write_text(peers(items))
    (out / "keepkv-modes.md").write_text(key_modes(items))


def beside(held: list[Record], made: list[Record], name: str) -> list[Record]:
    """``held`` and those of ``made`` that are not of their cells; raises where an item of both has two scores."""
    known = {place(row): row for row in held}
    fresh = [row for row in made if place(row) not in known]
    if name == ITEMS:
        again = [row for row in made if place(row) in known]
        other = [row for row in again if not _same(row["score"], known[place(row)]["score"])]
        print(f"{len(again)} items were run again, {len(other)} of them with another score")
        if other:
            raise SystemExit(f"e.g. {place(other[0])}: the rows cannot be compared, nothing was written")
    return held + fresh


def _same(one: float | None, other: float | None) -> bool:
    """Equal, or probabilities that were rounded otherwise."""
    return one == other or (one is not None and other is not None and abs(one - other) < ROUNDING)


def place(row: Record) -> tuple[Any, ...]:
    """Where a row belongs, whichever of the three files it is of."""
    cell = (row[key] for key in ("task", "length", "mode", "method", "budget"))
    return *cell, row["seed"] if "seed" in row else row["seeds"][0]


if __name__ == "__main__":
    main()
