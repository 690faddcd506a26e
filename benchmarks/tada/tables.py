"""Tables of ``results/*.json``: ``python -m benchmarks.tada.tables`` writes ``results/tables.md``."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from keepkv.store.codec.tada import break_even, mean_bits

RESULTS = Path(__file__).parent / "results"


def table(*rows: list[Any]) -> list[str]:
    """Lines of a table, the first its head."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def heads(found: dict[str, Any]) -> list[str]:
    """A line for each layer."""
    lines = [["layer", "KV heads", "keys: ρ", "varying, before RoPE", "saved, energy", "ranges", "values: ρ", "varying",
              "saved, energy", "ranges", "cost", "pays from ρ", "with 8-bit means"]]  # fmt: skip
    for row in found["calibrations"][0]["layers"]:
        keys, values = row["keys"], row["values"]
        cells = [keys["rho"], row["before_rope"]["varying"], keys["by_energy"], keys["by_range"], values["rho"],
                 values["varying"], values["by_energy"], values["by_range"], keys["cost"]]  # fmt: skip
        least = (break_even(row["heads"], mean_bits(mean, row["widths"][0])) for mean in ("16bit", "8bit"))
        lines.append([row["layer"], row["heads"], *(f"{x:.2f}" for x in cells), *(f"{x:.3f}" for x in least)])
    return table(*lines)


def arms(found: dict[str, Any]) -> list[str]:
    """A line for each arm of each search; bold: the one that is written."""
    lines = [["at most", "arm", "bits of a code", "KL, nats", "bits by layer"]]
    for one in found["calibrations"]:
        for name, arm in one["arms"].items():
            kl, mark = arm["divergence"], "**" if name == one["written"] else ""
            size = f"{fmean(kl):.4f} ± {stdev(kl) / len(kl) ** 0.5:.4f}"
            lines.append([f"{one['bits']:g}", f"{mark}{name}{mark}", f"{arm['average']:.2f}", size,
                          " ".join(map(str, arm["bits"]))])  # fmt: skip
    return table(*lines)


def choices(found: dict[str, Any]) -> list[str]:
    """A line for each choice at equal bits of a code, and its difference from plain codes on the same texts."""
    rows = [row for row in found["ablation"] if not row["beside"]]
    plain = {row["codes"]: row["kl_of_texts"] for row in rows if row["choice"] == "plain"}
    lines = [["codes", "bits of a code", "bits in all", "error of keys", "of values", "KL, nats", "minus plain"]]
    for row in rows:
        gap = "" if row["choice"] == "plain" else _difference(row["kl_of_texts"], plain[row["codes"]])
        lines.append([row["choice"], f"{row['codes']:g}", f"{row['held']:.2f}", f"{row['keys']:.4f}",
                      f"{row['values']:.4f}", f"{_size(row['kl'])} ± {_size(row['spread'])}", gap])  # fmt: skip
    return table(*lines)


def equal_bytes(found: dict[str, Any]) -> list[str]:
    """A line for each choice that has means, beside codes without them of as many bits in all."""
    named = {f"{row['choice']}, {row['codes']:g} bits": row for row in found["ablation"] if not row["beside"]}
    lines = [["with a mean", "bits in all", "KL, nats", "without", "bits in all", "KL, nats", "with minus without"]]
    for row in (row for row in found["ablation"] if row["beside"]):
        other = named[row["beside"]]
        lines.append([row["beside"], f"{other['held']:.2f}", _size(other["kl"]), f"{row['choice']}, {row['codes']:.2f}",
                      f"{row['held']:.2f}", _size(row["kl"]),
                      _difference(other["kl_of_texts"], row["kl_of_texts"])])  # fmt: skip
    return table(*lines)


def _size(x: float) -> str:
    return f"{x:.4f}" if abs(x) >= 0.01 else f"{x:.2g}"


def _difference(one: list[float], other: list[float]) -> str:
    """Mean of ``one`` − ``other`` and half of its 95 % interval; bold where that excludes 0."""
    gap = [a - b for a, b in zip(one, other, strict=True)]
    mean, half = fmean(gap), 1.96 * stdev(gap) / len(gap) ** 0.5
    text = f"{'+' if mean >= 0 else '−'}{_size(abs(mean))} ± {_size(half)}"
    return f"**{text}**" if abs(mean) > half else text


def page() -> str:
    """Every table of every model."""
    lines = ["# TaDA: tables", "", "Made by `python -m benchmarks.tada.tables` of the rows beside it."]
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text())
        made, pieces = found["made_with"], found["pieces"]
        with_ = ", ".join(f"{name} {made['versions'][name]}" for name in ("torch", "transformers"))
        about = (
            f"{made['device']}, {made['dtype']}, {with_}; {found['texts']} of {found['length']} tokens: {pieces[0]} "
        )
        about += f"to calibrate on, {pieces[1]} for the rest; seed {found['seed']}, {found['proposals']} proposals."
        parts = {
            "Correlation of heads, and bits of a number that a mean of 16 bits saves and costs": heads,
            "Bits by layer": arms,
            "With and without a mean, at equal bits of a code": choices,
            "At equal bits in all": equal_bytes,
        }
        lines += ["", f"## {found['name']}", "", about]
        for title, part in parts.items():
            lines += ["", f"### {title}", "", *part(found)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (RESULTS / "tables.md").write_text(page())
