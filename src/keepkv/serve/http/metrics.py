"""/metrics for Prometheus: the engine's own numbers as they are when asked, and how long requests took."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from keepkv.serve.engine import Engine
from keepkv.serve.request import Finished

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
GAUGES = {  # a field of the statistics: its name here, and what it is
    "rows": ("rows", "Requests that decode."),
    "reading": ("reading", "Requests whose prompt is read."),
    "waiting": ("waiting", "Requests in the queue."),
    "bytes": ("cache_bytes", "Bytes that caches hold, contexts included."),
    "reserved": ("reserved_bytes", "Bytes that may still come of what was admitted, those held included."),
    "limit": ("limit_bytes", "Bytes that caches may hold."),
    "contexts": ("contexts", "Contexts by name."),
    "contexts_in_memory": ("contexts_in_memory", "Contexts whose cache is in memory."),
    "context_bytes": ("context_bytes", "Bytes of contexts in memory."),
    "context_disk": ("context_disk_bytes", "Bytes of contexts on disk."),
}
COUNTERS = {
    "prompt_tokens": "Tokens of prompts, contexts included.",
    "cached_tokens": "Tokens of contexts that prompts did not read again.",
    "completion_tokens": "Tokens of replies.",
    "steps": "Forwards that decoded.",
    "decoded": "Rows in those forwards.",
}
BY_LABEL = {
    "finished": ("reason", "Requests by how they ended."),
    "refused": ("error", "Requests by the error that refused them."),
    "seconds": ("work", "Seconds by what the worker did."),
}


class _Engine:
    """The statistics of an engine, read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """One family for each number."""
        now = self.engine.stats()
        for field, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(f"keepkv_{name}", text, value=getattr(now, field))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"keepkv_{name}", text, value=getattr(now, name))
        for name, (label, text) in BY_LABEL.items():
            family = CounterMetricFamily(f"keepkv_{name}", text, labels=[label])
            for value, count in getattr(now, name).items():
                family.add_metric([value], count)
            yield family


class Metrics:
    """A registry of its own, so that two servers in one process do not mix."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Engine(engine))
        self.first = self._seconds("time_to_first_token", "From a request to its first token.")
        self.whole = self._seconds("request", "From a request to the end of its reply.")
        self.waited = self._seconds("queue", "From a request until its memory was reserved.")

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(f"keepkv_{name}_seconds", text, buckets=SECONDS, registry=self.registry)

    def ended(self, ends: Sequence[Finished]) -> None:
        """Enter replies that ended."""
        for times in (end.times for end in ends):
            self.waited.observe(times.admitted - times.arrived)
            self.whole.observe(times.ended - times.arrived)
            if times.first is not None:
                self.first.observe(times.first - times.arrived)
