"""The samples of every metric of one choice, over all its seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from keepkv.characterize.record import metrics
from keepkv.characterize.record.names import LATENCIES, METRICS, STATISTICS
from keepkv.characterize.record.resample import Samples
from keepkv.characterize.record.rows import PointRow, RequestRow
from keepkv.core.budget import Budget

SLICES = 10  # of a window, in each of which throughput is counted
Key = tuple[int, ...]
Found = dict[str, Samples]
Requests = Mapping[str, Sequence[RequestRow]]


def samples(points: Sequence[PointRow], requests: Requests, limits: Mapping[str, float] | None) -> Found:
    """The samples of the metrics of ``points``, which are of one choice at one place, finished, and in order. requests:
    of each point, by its digest. Metrics that were not measured are left out."""
    held: dict[str, list[tuple[Key, float]]] = {}

    def add(name: str, key: Key, value: float | None) -> None:
        if value is not None:
            held.setdefault(name, []).append((key, float(value)))

    for run, point in runs(points):
        rows = requests.get(point.point, ())
        for row in metrics.ok(rows):
            for name, value in of_request(row).items():
                add(name, (*run, *row.key), value)
            for i, gap in enumerate(metrics.itl(row)):
                add("itl", (*run, *row.key, i), gap)
        for i, name, value in _slices(rows, point.window_s, limits):
            add(name, (*run, i), value)
        for name, value in of_window(point, rows).items():
            add(name, (*run, 0), value)
    found: Found = {}
    for name, pairs in held.items():
        keys, values = zip(*sorted(pairs), strict=True)
        for metric, statistic in _metrics_of(name):
            found[metric] = Samples(values, keys, statistic)
    return found


def paired(points: Sequence[PointRow], bases: Sequence[PointRow], requests: Requests) -> tuple[Found, str | None]:
    """The samples of metrics against the full cache on the same items, and the family whose scores fell most. bases:
    the baselines of the same place; that of the same seed and block is taken, or else one of the same seed."""
    drops: dict[str, list[tuple[Key, float]]] = {}
    others: dict[str, list[tuple[Key, float]]] = {"lost": [], "same": [], "length_ratio": []}
    for run, point in runs(points):
        base = next((b for b in bases if (b.seed, b.block) == (point.seed, point.block)), None)
        base = base or next((b for b in bases if b.seed == point.seed), None)
        if base is None:
            continue
        whole = {row.key: row for row in metrics.ok(requests.get(base.point, ()))}
        for row in metrics.ok(requests.get(point.point, ())):
            full = whole.get(row.key)
            if full is None:
                continue
            key = (*run, *row.key)
            others["same"].append((key, float(row.reply == full.reply)))
            if row.n_out and full.n_out:
                others["length_ratio"].append((key, row.n_out / full.n_out))
            if row.score is not None and full.score is not None:
                drops.setdefault(row.family, []).append((key, full.score - row.score))
                if full.score == 1.0:
                    others["lost"].append((key, float(row.score < 1.0)))
    found = {name: _of(pairs) for name, pairs in others.items() if pairs}
    if not drops:
        return found, None
    families = {name: _of(pairs) for name, pairs in drops.items()}
    worst = max(families, key=lambda name: (_upper(families[name]), name))
    found |= {"score_drop": _of(list(chain(*drops.values()))), "worst_drop": families[worst]}
    return found, worst


def runs(points: Iterable[PointRow]) -> list[tuple[Key, PointRow]]:
    """Each point with its seed and which run of that seed it is."""
    counts: dict[int, int] = {}
    made: list[tuple[Key, PointRow]] = []
    for point in points:
        counts[point.seed] = counts.get(point.seed, -1) + 1
        made.append(((point.seed, counts[point.seed]), point))
    return made


def of_request(row: RequestRow) -> dict[str, float | None]:
    """What one answered request says."""
    first = metrics.ttft(row)
    share = None if row.compress_s is None or not first else row.compress_s / first
    return {
        **{name: of(row) for name, of in metrics.OF_REQUEST.items()},
        "score": row.score,
        "leaked": None if row.leaked is None else float(row.leaked),
        "ratio": None if row.kv_bytes is None or not row.kv_full else row.kv_bytes / row.kv_full,
        "kv_bytes": row.kv_bytes,
        "kv_logical_bytes": row.kv_logical,
        "kv_bytes_per_token": None if row.kv_bytes is None or not row.kv_tokens else row.kv_bytes / row.kv_tokens,
        "compress_s": row.compress_s,
        "compress_share": share,
        "cached_share": None if row.cached is None or not row.n_in else row.cached / row.n_in,
    }


def of_window(point: PointRow, rows: Sequence[RequestRow]) -> dict[str, float | None]:
    """What a point as a whole says: energy, memory, and what was asked for."""
    if point.imported is not None:
        return point.metrics
    found: dict[str, float | None] = {"peak_bytes": point.peak_bytes, "ratio_asked": asked(point, rows)}
    if point.window_s:
        found |= metrics.energy(rows, point.window_s, point.joules, point.idle_watts)
    return found


def asked(point: PointRow, rows: Sequence[RequestRow]) -> float | None:
    """The budget as a share of a plain cache: of a share itself, of slots by the tokens read, of bytes by its bytes."""
    given = point.spec.get("technique", {}).get("budget")
    if given is None:
        return 1.0
    budget, done = Budget.of(given), metrics.ok(rows)
    tokens = [row.kv_tokens for row in done if row.kv_tokens]
    full = [row.kv_full for row in done if row.kv_full]
    if budget.slots is not None:
        return min(1.0, budget.slots * len(tokens) / sum(tokens)) if tokens else None
    if budget.bytes is not None:
        return min(1.0, budget.bytes * len(full) / sum(full)) if full else None
    return budget.share if budget.share is not None else budget.share_of_bytes


def _slices(
    rows: Sequence[RequestRow], window_s: float | None, limits: Mapping[str, float] | None
) -> list[tuple[int, str, float]]:
    """Throughput in each of the slices of a window. Goodput where there are limits to keep, else all that finished."""
    if not window_s or not rows:
        return []
    step = window_s / SLICES
    return [
        (i, name, value)
        for i in range(SLICES)
        for name, value in metrics.rates(rows, i * step, (i + 1) * step, limits).items()
    ]


def _metrics_of(name: str) -> list[tuple[str, str]]:
    """Metrics that are made of samples of that name, each with its statistic."""
    if name in LATENCIES:
        return [(f"{name}_{statistic}", statistic) for statistic in STATISTICS]
    return [(name, "mean")] if name in METRICS else []


def _of(pairs: list[tuple[Key, float]]) -> Samples:
    keys, values = zip(*sorted(pairs), strict=True)
    return Samples(values, keys)


def _upper(one: Samples) -> float:
    found = one.estimate()
    return found.mean if found.high is None else found.high
