"""Metrics of requests and of windows, as pure functions of rows. Seconds, tokens, bytes, joules.

Definitions are those of arXiv 2508.16712's kind of study: queue = admit − arrive; TTFT = first − arrive; service TTFT =
first − admit; TPOT = (end − first) / (n_out − 1), undefined for one token; ITL = gaps between tokens; E2E = end −
arrive. Throughput counts what came within the window alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

from keepkv.characterize.record.rows import RequestRow

Latency = Callable[[RequestRow], float | None]


def queue(row: RequestRow) -> float | None:
    return None if row.admit is None else row.admit - row.arrive


def ttft(row: RequestRow) -> float | None:
    return row.times[0] - row.arrive if row.times else None


def service_ttft(row: RequestRow) -> float | None:
    return row.times[0] - row.admit if row.times and row.admit is not None else None


def tpot(row: RequestRow) -> float | None:
    if not row.times or row.end is None or row.n_out is None or row.n_out < 2:
        return None
    return (row.end - row.times[0]) / (row.n_out - 1)


def e2e(row: RequestRow) -> float | None:
    return None if row.end is None else row.end - row.arrive


def itl(row: RequestRow) -> list[float]:
    """One for each token, or piece of text, but the first."""
    return [later - sooner for sooner, later in pairwise(row.times)]


OF_REQUEST: dict[str, Latency] = {
    "queue": queue, "ttft": ttft, "service_ttft": service_ttft, "tpot": tpot, "e2e": e2e,
}  # fmt: skip


def ok(rows: Iterable[RequestRow]) -> list[RequestRow]:
    """Requests of the window, not of the warm-up, that were answered."""
    return [row for row in rows if row.status == "ok" and row.number >= 0]


def within(row: RequestRow, limits: Mapping[str, float]) -> bool:
    """Whether an answered request kept all ``limits``, in seconds by name. One token has no time per token to keep."""
    found = {name: OF_REQUEST[name](row) for name in limits}
    return row.status == "ok" and all(value is None or value <= limits[name] for name, value in found.items())


def tokens_in(rows: Iterable[RequestRow], start: float, end: float) -> float:
    """Tokens of replies that came from ``start`` to ``end``. Where pieces of text are all that is seen, the tokens of a
    reply are spread evenly over its pieces."""
    total = 0.0
    for row in rows:
        if row.times:
            share = (row.n_out or len(row.times)) / len(row.times)
            total += share * sum(start <= at < end for at in row.times)
    return total


def rates(
    rows: Sequence[RequestRow], start: float, end: float, limits: Mapping[str, float] | None = None
) -> dict[str, float]:
    """``output_per_s``, ``total_per_s`` (prompts whose first token came are read), ``requests_per_s`` finished, and
    ``goodput_per_s`` finished within all ``limits``, from ``start`` to ``end``. Requests of the warm-up count too, as
    far as they reach into it."""
    span = end - start
    out = tokens_in(rows, start, end)
    read = sum(row.n_in or 0 for row in rows if row.times and start <= row.times[0] < end)
    done = [row for row in rows if row.status == "ok" and row.end is not None and start <= row.end < end]
    good = sum(within(row, limits or {}) for row in done)
    return {
        "output_per_s": out / span, "total_per_s": (out + read) / span, "requests_per_s": len(done) / span,
        "goodput_per_s": good / span,
    }  # fmt: skip


def energy(
    rows: Sequence[RequestRow], window_s: float, joules: float | None, idle_watts: float | None
) -> dict[str, float | None]:
    """Joules of a window by tokens, requests and correct answers of it, all of the machine and, under ``net_…``, what
    it takes at rest subtracted; ``power_w``; ``energy_delay_js``: joules of a request times its mean end-to-end time.
    Each is None where ``joules`` is, or where there is nothing to divide by."""
    span = rates(rows, 0.0, window_s)
    done = [row for row in ok(rows) if row.end is not None and row.end < window_s]
    counts = {
        "output_token": span["output_per_s"] * window_s, "token": span["total_per_s"] * window_s,
        "request": float(len(done)), "correct": float(sum(row.score == 1.0 for row in done)),
    }  # fmt: skip
    net = None if joules is None or idle_watts is None else joules - idle_watts * window_s
    found: dict[str, float | None] = {"power_w": _by(joules, window_s)}
    for name, count in counts.items():
        found[f"j_per_{name}"], found[f"net_j_per_{name}"] = _by(joules, count), _by(net, count)
    delays = [x for row in done if (x := e2e(row)) is not None]
    each = found["j_per_request"]
    found["energy_delay_js"] = None if each is None or not delays else each * sum(delays) / len(delays)
    return found


def queue_grows(rows: Sequence[RequestRow], window_s: float) -> bool:
    """Whether requests of an open loop came faster than they were answered: how many were under way in the last quarter
    of the window, at the times at which others came, beside the first half. It grew where that is more by over a tenth
    of all that came, and by two at least."""
    due = sorted(row.arrive for row in rows if row.number >= 0)
    ends = [row.end if row.end is not None else float("inf") for row in rows if row.number >= 0]

    def under_way(at: float) -> int:
        return sum(arrive <= at for arrive in due) - sum(end <= at for end in ends)

    early = [under_way(at) for at in due if at < window_s / 2]
    late = [under_way(at) for at in due if at >= 0.75 * window_s]
    if not early or not late:
        return False
    return sum(late) / len(late) - sum(early) / len(early) > max(2.0, 0.1 * len(due))


def flat(values: Sequence[float], tolerance: float = 0.1) -> bool:
    """Whether a straight line through ``values`` (least squares) changes by less than ``tolerance`` of their mean from
    the first to the last. Fewer than three say nothing."""
    n = len(values)
    if n < 3:
        return False
    mean, middle = sum(values) / n, (n - 1) / 2
    slope = sum((i - middle) * (x - mean) for i, x in enumerate(values)) / sum((i - middle) ** 2 for i in range(n))
    return mean == 0 or abs(slope * (n - 1)) <= tolerance * abs(mean)


def _by(total: float | None, count: float) -> float | None:
    return None if total is None or count <= 0 else total / count
