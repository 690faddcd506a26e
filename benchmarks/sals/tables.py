"""Tables of the rows: ``python -m benchmarks.sals.tables`` writes ``results/tables.md``."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.sals.run import ARMS, HERE

MODELS = ("embedded", "smollm2")


def rows_of(name: str, where: Path = HERE) -> list[dict[str, Any]]:
    """The rows of one file; none where it does not exist."""
    path = where / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    """A table of Markdown."""
    return ["| " + " | ".join(x) + " |" for x in (head, ["---"] * len(head), *lines)]


def selections(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each selection, mean over layers, ± the standard error over texts."""
    lines = []
    for arm in ARMS:
        mine = [x for x in rows if x["arm"] == arm]
        texts = [fmean(one) for one in zip(*(x["by_text"] for x in mine), strict=True)]
        error = stdev(texts) / len(texts) ** 0.5
        total = fmean((x["bytes_ranking"] + x["bytes_attending"]) / x["bytes_plain"] for x in mine)
        ranking, held = (fmean(x[k] / x["bytes_plain"] for x in mine) for k in ("bytes_ranking", "bytes_held"))
        lines.append(
            [arm, f"{fmean(texts):.3f} ± {error:.3f}", f"{min(x['mass'] for x in mine):.3f}",
             f"{fmean(x['recall'] for x in mine):.3f}", f"{ranking:.3f}", f"{total:.3f}", f"{held:.3f}"]
        )  # fmt: skip
    return table(["selection", "mass kept", "worst layer", "recall", "bytes: ranking", "all read", "held"], lines)


def layers(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each layer: energy on held-out text, and mass kept."""
    arms = ["exact", "codes, int4", "latent, r* = d", "latent, r* = d/8", "codes, r* = d/8", "quest"]
    lines = []
    for layer in sorted({x["layer"] for x in rows}):
        mine = {x["arm"]: x for x in rows if x["layer"] == layer}
        energy = mine["exact"]["energy"] or [float("nan")] * 2
        lines.append([str(layer), *(f"{x:.3f}" for x in energy), *(f"{mine[arm]['mass']:.3f}" for arm in arms)])
    return table(["layer", "energy, d/4", "d/8", *arms], lines)


def times(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each arm, a column for each number of tokens."""
    counts = sorted({x["tokens"] for x in rows})
    lines = []
    for arm in dict.fromkeys(x["arm"] for x in rows):
        mine = {x["tokens"]: x for x in rows if x["arm"] == arm}
        cells = (f"{x['ratio']:.2f} ± {x['spread']:.2f} ({x['ms']:.2f} ms)" for x in (mine[n] for n in counts))
        lines.append([arm, *cells])
    return table(["arm", *(f"{n:,} tokens" for n in counts)], lines)


def page() -> str:
    """All tables."""
    text = ["# Tables", "", "Written by `python -m benchmarks.sals.tables`.", ""]
    for name in MODELS:
        if rows := rows_of(name):
            text += [f"## {name}", "", *selections(rows), "", *layers(rows), ""]
    if rows := rows_of("times"):
        text += ["## Times", "", *times(rows), ""]
    return "\n".join(text)


if __name__ == "__main__":
    (HERE / "tables.md").write_text(page(), encoding="utf-8")
