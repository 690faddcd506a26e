"""The metrics: what each is called, its unit, and which way is better."""

from __future__ import annotations

from typing import Literal, NamedTuple

from keepkv.errors import UnknownName

STATISTICS = ("mean", "p50", "p90", "p95", "p99")
LATENCIES = {
    "queue": "waiting before work on it began", "ttft": "until the first token",
    "service_ttft": "until the first token, once work on it began", "tpot": "per token after the first",
    "itl": "between two tokens", "e2e": "until the last token",
}  # fmt: skip


class Metric(NamedTuple):
    """best: which way is better; None where neither is. words: what it is."""

    unit: str
    best: Literal["min", "max"] | None
    words: str


METRICS: dict[str, Metric] = {
    **{f"{name}_{s}": Metric("s", "min", f"{words}, {s}") for name, words in LATENCIES.items() for s in STATISTICS},
    "output_per_s": Metric("tokens/s", "max", "tokens written"),
    "total_per_s": Metric("tokens/s", "max", "tokens read and written"),
    "requests_per_s": Metric("1/s", "max", "requests finished"),
    "goodput_per_s": Metric("1/s", "max", "requests finished within all limits"),
    "power_w": Metric("W", "min", "mean power"),
    **{
        f"{net}j_per_{what}": Metric("J", "min", f"energy per {what.replace('_', ' ')}{more}")
        for net, more in (("", ""), ("net_", ", rest subtracted"))
        for what in ("output_token", "token", "request", "correct")
    },
    "energy_delay_js": Metric("J s", "min", "energy of a request times its time"),
    "score": Metric("", "max", "score of replies"),
    "score_drop": Metric("", "min", "score lost against the full cache, item by item"),
    "worst_drop": Metric("", "min", "the same in the family that lost most"),
    "lost": Metric("", "min", "share of right answers that became wrong"),
    "same": Metric("", "max", "share of replies that are the full cache's to the letter"),
    "leaked": Metric("", "min", "share of replies that tell what the prompt forbids"),
    "length_ratio": Metric("", None, "tokens of a reply by those with the full cache"),
    "ratio_asked": Metric("", None, "bytes asked for by bytes of a plain cache"),
    "ratio": Metric("", "min", "bytes held by bytes of a plain cache"),
    "kv_bytes": Metric("B", "min", "allocated for a request, compression done"),
    "kv_logical_bytes": Metric("B", "min", "of it, slots in use"),
    "kv_bytes_per_token": Metric("B", "min", "allocated, by tokens read"),
    "peak_bytes": Metric("B", "min", "most memory of the process, weights included"),
    "compress_s": Metric("s", "min", "spent compressing, of the batch of a request"),
    "compress_share": Metric("", "min", "of the time to the first token, spent compressing"),
    "cached_share": Metric("", "max", "of the prompt, not read again"),
}
PAIRED = ("score_drop", "worst_drop", "lost", "same", "length_ratio")  # against the full cache on the same items


def metric(name: str) -> Metric:
    """The metric of that name. Raises ``UnknownName`` with the nearest one."""
    if name not in METRICS:
        raise UnknownName("metric", name, METRICS)
    return METRICS[name]
