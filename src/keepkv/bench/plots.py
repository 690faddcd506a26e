"""The three pictures of a sweep: latency and memory against context, throughput against batch; needs ``plots``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import wrap

from keepkv.bench.rows import BenchRow
from keepkv.errors import KeepKVError

Number = Callable[[BenchRow], float | None]
Band = Callable[[BenchRow], tuple[float, float] | None]
MIB = 1 << 20


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
    pictures: dict[str, tuple[str, str, Number, Number, Number, Band | None, Number | None]] = {
        "latency": ("tokens of the context", "ms per decoded token, dotted: floor", _context, _decode, _batch, _spread,
                    _floor),
        "throughput": ("rows of the batch", "tokens per second", _batch, _throughput, _context, None, None),
        "memory": ("tokens of the context", "MiB of cache, dotted: peak while running", _context, _bytes, _batch, None,
                   _peak),
    }  # fmt: skip
    written = []
    with rc_context(LOOK):
        for kind, picture in pictures.items():
            if shown:
                path = into / f"{name}-{kind}.svg"
                path.write_text(_picture(shown, *picture), encoding="utf-8")
                written.append(path)
    return written


def _picture(
    rows: Sequence[BenchRow],
    xlabel: str,
    ylabel: str,
    x: Number,
    y: Number,
    other: Number,
    band: Band | None,
    dotted: Number | None,
) -> str:
    """other: what else varies; each of its values has a line of its own, except batches that a cap decided."""
    from keepkv.report.figures import svg
    from keepkv.report.figures.look import headed, legend, panels
    from keepkv.report.style import PALETTE

    several = len({other(row) for row in rows if row.cap is None}) > 1
    word = "rows" if other is _batch else "tokens"

    def line(row: BenchRow) -> str:
        return name_of(row) + (f", {other(row):,.0f} {word}" if several and row.cap is None else "")

    places = list(dict.fromkeys((row.made_with.model or "", row.made_with.device) for row in rows))
    names = list(dict.fromkeys(map(line, rows)))
    figure, axes = panels(len(places), 2, 5.2, 3.4)
    for axis, place in zip(axes, places, strict=True):
        for i, name in enumerate(names):
            mine = [row for row in rows if (row.made_with.model, row.made_with.device) == place and line(row) == name]
            # The plain cache is in every block: its first measurement is drawn.
            own = sorted({x(row): row for row in reversed(mine)}.values(), key=lambda row: x(row) or 0)
            at, colour = [x(row) for row in own], PALETTE[i % len(PALETTE)]
            axis.plot(at, [y(row) for row in own], "o-", ms=3.5, color=colour, label=name)
            if band is not None and (spreads := [found for row in own if (found := band(row))]):
                axis.fill_between(at, *zip(*spreads, strict=True), color=colour, alpha=0.15, lw=0)
            if dotted is not None:
                axis.plot(at, [dotted(row) for row in own], ":", lw=1, color=colour)
        axis.set_xscale("log", base=2)
        axis.set(xlabel=xlabel, ylim=(0, None))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set_title("\n".join(wrap(",".join(place).replace(",", ", "), 50)), fontsize=7)
    legend(figure, names)
    return svg(headed(figure, ylabel))


def name_of(row: BenchRow) -> str:
    """System with store and budget: a line of its own in a picture, a name in a table."""
    return " ".join(str(part) for part in (row.label, row.store, row.budget) if part is not None)


def _context(row: BenchRow) -> float:
    return row.context


def _batch(row: BenchRow) -> float | None:
    return row.batch


def _decode(row: BenchRow) -> float | None:
    return None if row.decode is None else row.decode.median * 1e3


def _spread(row: BenchRow) -> tuple[float, float] | None:
    return None if row.decode is None else (row.decode.p20 * 1e3, row.decode.p80 * 1e3)


def _floor(row: BenchRow) -> float | None:
    return row.floor and row.floor * 1e3


def _throughput(row: BenchRow) -> float | None:
    return None if row.throughput is None else row.throughput.median


def _bytes(row: BenchRow) -> float | None:
    return row.cache_bytes and row.cache_bytes / MIB


def _peak(row: BenchRow) -> float | None:
    return None if row.peak_bytes is None or row.base_bytes is None else (row.peak_bytes - row.base_bytes) / MIB
