"""The three pictures of a sweep: latency and memory against context, throughput against batch; needs ``plots``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from keepkv.bench.rows import BenchRow
from keepkv.errors import KeepKVError

MIB = 1 << 20
LINES = 10  # in one panel, at most
AXES = {"context": ("tokens of the context", "tokens"), "batch": ("rows of the batch", "rows")}
# What is drawn against what, in which unit of the row's; what is dotted beside it.
PICTURES = {
    "latency": ("ms per decoded token, dotted: floor", "context", "decode", 1e-3, "floor"),
    "throughput": ("tokens per second", "batch", "throughput", 1.0, None),
    "memory": ("MiB of cache, dotted: peak while running", "context", "cache_bytes", MIB, "peak"),
}


def need_matplotlib() -> None:
    """Raises, before anything is measured, where pictures could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as missing:
        raise KeepKVError("plots need matplotlib: pip install 'keepkv[plots]', or give --no-plots") from missing


def draw(rows: Sequence[BenchRow], into: Path, name: str = "bench") -> list[Path]:
    """Writes ``name-latency.svg``, ``name-throughput.svg`` and ``name-memory.svg``; returns those with something in
    them. A panel for each model and device; rows of overhead and failed ones are left out."""
    from matplotlib import rc_context

    from keepkv.report.figures.look import LOOK

    shown = [row for row in rows if row.kind == "sweep" and row.error is None]
    written = []
    with rc_context(LOOK):
        for kind, picture in PICTURES.items():
            if shown:
                path = into / f"{name}-{kind}.svg"
                path.write_text(_picture(shown, *picture), encoding="utf-8")
                written.append(path)
    return written


def _picture(rows: Sequence[BenchRow], title: str, x: str, y: str, unit: float, dotted: str | None) -> str:
    """Each value of what else varies has a line of its own, except batches that a cap decided. A panel has ten lines at
    most, each with a mark and a dash of its own."""
    from keepkv.report.figures import svg
    from keepkv.report.figures.look import headed, look, panels
    from keepkv.report.style import MOST, styles

    other = "batch" if x == "context" else "context"
    several = len({getattr(row, other) for row in rows if row.cap is None}) > 1

    def line(row: BenchRow) -> str:
        return name_of(row) + (f", {getattr(row, other):,.0f} {AXES[other][1]}" if several and row.cap is None else "")

    places = list(dict.fromkeys((row.made_with.model or "", row.made_with.device) for row in rows))
    names = list(dict.fromkeys(map(line, rows)))
    parts = [names[i : i + LINES] for i in range(0, len(names), LINES)]
    shown = [(place, part) for place in places for part in parts]
    figure, axes = panels(len(shown), 2, 6.8, 3.4)
    for axis, (place, part) in zip(axes, shown, strict=True):
        drawn = styles(part[:MOST], part[MOST:])
        for name in part:
            mine = [row for row in rows if (row.made_with.model, row.made_with.device) == place and line(row) == name]
            # The plain cache is in every block: its first measurement is drawn.
            first = {getattr(row, x): row for row in reversed(mine)}
            at, style = sorted(first), look(drawn[name], 4)
            colour = style["color"]
            own = [first[one] for one in at]
            axis.plot(at, [_number(row, y, unit) for row in own], label=name, **style)
            if y == "decode" and (spreads := [(z.p20 / unit, z.p80 / unit) for row in own if (z := row.decode)]):
                axis.fill_between(at, *zip(*spreads, strict=True), color=colour, alpha=0.15, lw=0)
            if dotted is not None:
                axis.plot(at, [_number(row, dotted, unit) for row in own], ":", lw=1, color=colour)
        axis.set_xscale("log", base=2)
        axis.set(xlabel=AXES[x][0], ylim=(0, None))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set_title("\n".join(wrap(",".join(place).replace(",", ", "), 50)), fontsize=7)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
    return svg(headed(figure, title))


def name_of(row: BenchRow) -> str:
    """System with store and budget: a line of its own in a picture, a name in a table."""
    return " ".join(str(part) for part in (row.label, row.store, row.budget) if part is not None)


def _number(row: BenchRow, name: str, unit: float) -> float | None:
    """A field of ``row``, or its median; peak: the most memory above that before."""
    if name == "peak":
        found = None if row.peak_bytes is None or row.base_bytes is None else row.peak_bytes - row.base_bytes
    else:
        found = getattr(row, name)
    return None if found is None else getattr(found, "median", found) / unit
