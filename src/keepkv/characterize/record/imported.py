"""Results of other load generators as points: guidellm, ``vllm bench serve``, aiperf.

Their names do not always mean ours. The time per token after the first one is ``tpot`` here and of vLLM, and
``inter_token_latency`` of guidellm and aiperf; ``time_per_output_token`` of guidellm counts the first token's wait too,
and has no counterpart here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from keepkv.characterize.record.names import METRICS, STATISTICS
from keepkv.characterize.record.rows import PointRow
from keepkv.errors import KeepKVError
from keepkv.measure.environment import MadeWith, versions

Metrics = dict[str, float | None]
GUIDELLM = {
    "ttft": ("time_to_first_token_ms", 1e-3), "tpot": ("inter_token_latency_ms", 1e-3), "e2e": ("request_latency", 1.0),
}  # fmt: skip
VLLM = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2e": "e2el"}
AIPERF = {
    "ttft": "time_to_first_token", "tpot": "inter_token_latency", "itl": "inter_chunk_latency",
    "e2e": "request_latency",
}  # fmt: skip
SECONDS = {"ms": 1e-3, "s": 1.0, "sec": 1.0, "seconds": 1.0, "us": 1e-6, "ns": 1e-9}


def imported(path: str | Path, technique: str = "full", application: str = "imported") -> list[PointRow]:
    """A point for each benchmark in a JSON file of one of the tools. technique: what the server held its cache with.
    Raises ``KeepKVError`` where the file is of none."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        held = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise KeepKVError(f"cannot read {str(path)!r} as JSON: {error}") from error
    try:
        found = list(_benchmarks(held))
    except (AttributeError, KeyError, TypeError) as error:
        raise KeepKVError(f"{str(path)!r} is not as the tool writes it: {type(error).__name__} {error}") from error
    if not found:
        raise KeepKVError(
            f"{str(path)!r} is no result of guidellm, vllm bench serve (--save-result) or aiperf "
            "(profile_export_aiperf.json)"
        )
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    made_with = MadeWith(device="of the server", dtype="of the server", versions=versions())
    return [
        PointRow(
            point=f"{digest}-{i}", status="ok", role="baseline" if technique == "full" else "point",
            application=application, workload=workload, technique=technique, weights="none",
            hardware="of the server", seed=0, block=0, spec={}, window_s=seconds, requests=requests, failed=failed,
            imported=tool, metrics={name: metrics.get(name) for name in METRICS}, made_with=made_with,
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        for i, (tool, workload, requests, failed, seconds, metrics) in enumerate(found)
    ]  # fmt: skip


Benchmark = tuple[str, str, int, int, float | None, Metrics]  # tool, workload, requests, failed, seconds, metrics


def _benchmarks(held: Any) -> Iterator[Benchmark]:
    if not isinstance(held, Mapping):
        return
    if isinstance(held.get("benchmarks"), list):
        for one in held["benchmarks"]:
            yield _guidellm(one)
    elif "request_throughput" in held and "mean_ttft_ms" in held:
        yield _vllm(held)
    elif isinstance(held.get("request_latency"), Mapping) and isinstance(held.get("request_throughput"), Mapping):
        yield _aiperf(held)


def _guidellm(one: Mapping[str, Any]) -> Benchmark:
    metrics, found = one["metrics"], Metrics()
    for name, (theirs, factor) in GUIDELLM.items():
        if theirs in metrics:
            good = metrics[theirs]["successful"]
            found |= _statistics(name, {"mean": good["mean"], **good["percentiles"]}, factor)
    rates = {
        "output_per_s": "output_tokens_per_second", "total_per_s": "tokens_per_second",
        "requests_per_s": "requests_per_second",
    }  # fmt: skip
    found |= {name: metrics[theirs]["successful"]["mean"] for name, theirs in rates.items() if theirs in metrics}
    totals, strategy = metrics.get("request_totals") or {}, (one.get("config") or {}).get("strategy") or {}
    how = [str(strategy.get("type_") or strategy.get("kind") or "benchmark")]
    how += [f"{key} {strategy[key]}" for key in ("rate", "streams", "max_concurrency") if strategy.get(key) is not None]
    return "guidellm", " ".join(how), totals.get("successful", 0), totals.get("errored", 0), one.get("duration"), found


def _vllm(one: Mapping[str, Any]) -> Benchmark:
    found = Metrics()
    for name, theirs in VLLM.items():
        values = {q: one.get(f"{q}_{theirs}_ms") for q in STATISTICS}
        values["p50"] = values["p50"] if values["p50"] is not None else one.get(f"median_{theirs}_ms")
        found |= _statistics(name, values, 1e-3)
    found |= {
        "output_per_s": one.get("output_throughput"), "total_per_s": one.get("total_token_throughput"),
        "requests_per_s": one["request_throughput"], "goodput_per_s": one.get("request_goodput"),
    }  # fmt: skip
    how = f"rate {one.get('request_rate')}, burstiness {one.get('burstiness')}, at most {one.get('max_concurrency')}"
    done = int(one.get("completed", 0))
    return "vllm bench serve", how, done, int(one.get("num_prompts", done)) - done, one.get("duration"), found


def _aiperf(one: Mapping[str, Any]) -> Benchmark:
    found = Metrics()
    for name, theirs in AIPERF.items():
        if isinstance(held := one.get(theirs), Mapping):
            found |= _statistics(name, {"mean": held.get("avg"), **held}, SECONDS[str(held.get("unit", "ms"))])
    rates = {
        "output_per_s": "output_token_throughput", "total_per_s": "total_token_throughput",
        "requests_per_s": "request_throughput", "goodput_per_s": "goodput",
    }  # fmt: skip
    found |= {name: one[theirs].get("avg") for name, theirs in rates.items() if isinstance(one.get(theirs), Mapping)}
    count, errors = ((one.get(name) or {}).get("avg") or 0 for name in ("request_count", "error_request_count"))
    return "aiperf", "as aiperf was told", int(count), int(errors), None, found


def _statistics(name: str, values: Mapping[str, Any], factor: float) -> Metrics:
    return {f"{name}_{q}": values[q] * factor for q in STATISTICS if values.get(q) is not None}
