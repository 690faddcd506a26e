"""What is drawn of results, with matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from keepkv.characterize.analyse.capacity import clients_of
from keepkv.characterize.analyse.schedule import rate_of
from keepkv.characterize.record.rows import ResultRow
from keepkv.report.style import styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Place = tuple[str, str, str]
Value = Callable[[ResultRow], float | None]


def drawn(rows: Sequence[ResultRow], front: Collection[tuple[Place, str]] = ()) -> list[str]:
    """SVG elements of ``rows``, which are of one application and machine; empty without matplotlib. front: places and
    choices that no other beats there, which a ring marks. A figure of what was not measured is left out."""
    if not find_spec("matplotlib"):
        return []
    import matplotlib

    from keepkv.report.figures import svg
    from keepkv.report.figures.look import LOOK

    found = []
    with matplotlib.rc_context(LOOK):
        for title, x, y, names in CHARTS:
            figure = _chart(rows, title, x, y, names, front)
            if figure is not None:
                found.append(svg(figure))
    return found


def of(name: str) -> Value:
    return lambda row: row.value(name)


def load(row: ResultRow) -> float | None:
    """Requests a second that came, or clients of a closed loop."""
    rate = rate_of(row)
    return rate if rate is not None else clients_of(row)


def tokens(row: ResultRow) -> float | None:
    """Tokens read into the cache of a request."""
    size, each = row.value("kv_bytes"), row.value("kv_bytes_per_token")
    return size / each if size is not None and each else None


CHARTS: tuple[tuple[str, Value, Value, tuple[str, str]], ...] = (
    (
        "Latency and throughput",
        of("output_per_s"),
        of("ttft_p95"),
        ("tokens written per second", "s to the first, p95"),
    ),
    ("Energy by load", load, of("j_per_output_token"), ("requests per second, or clients", "J per token written")),
    ("Quality and bytes", of("ratio"), of("score"), ("bytes held by bytes of a plain cache", "score")),
    ("Memory by context", tokens, of("kv_bytes"), ("tokens read", "bytes of a request's cache")),
    (
        "Pareto: bytes and time",
        of("ratio"),
        of("tpot_p50"),
        ("bytes held by bytes of a plain cache", "s per token, p50"),
    ),
)


def _chart(
    rows: Sequence[ResultRow],
    title: str,
    x: Value,
    y: Value,
    names: tuple[str, str],
    front: Collection[tuple[Place, str]],
) -> Figure | None:
    from matplotlib.figure import Figure

    from keepkv.report.figures.look import headed, legend, look

    groups: dict[str, list[tuple[float, float, tuple[Place, str]]]] = {}
    for row in rows:
        at, value = x(row), y(row)
        if at is not None and value is not None:
            name = row.technique.partition(" @ ")[0] + ("" if row.weights == "none" else f" + {row.weights}")
            groups.setdefault(name, []).append((at, value, (row.place, row.choice)))
    if not groups:
        return None
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes: Any = figure.subplots()
    drawn_as = styles([*groups])
    for name, points in groups.items():
        points.sort()
        axes.plot([p[0] for p in points], [p[1] for p in points], label=name, **look(drawn_as[name]))
        ringed = [p for p in points if p[2] in front]
        axes.plot([p[0] for p in ringed], [p[1] for p in ringed], "o", ms=11, mfc="none", mec="#1d2129", mew=0.8)
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    legend(figure, [*groups])
    return headed(figure, title)
