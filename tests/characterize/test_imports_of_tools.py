"""Results of other tools: each name means here what it means there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keepkv.characterize.record.imported import imported
from keepkv.characterize.record.names import METRICS
from keepkv.errors import KeepKVError


def spread(mean: float) -> dict[str, Any]:
    return {
        "successful": {"mean": mean, "percentiles": {"p50": mean, "p90": 2 * mean, "p95": 3 * mean, "p99": 4 * mean}}
    }


GUIDELLM = {
    "metadata": {"version": 2},
    "benchmarks": [
        {
            "config": {"strategy": {"type_": "poisson", "rate": 0.5}}, "duration": 12.0,
            "metrics": {
                "request_totals": {"successful": 6, "errored": 1, "incomplete": 0, "total": 7},
                "time_to_first_token_ms": spread(65.0), "inter_token_latency_ms": spread(29.0),
                "time_per_output_token_ms": spread(33.0), "request_latency": spread(0.3),
                "requests_per_second": spread(0.5), "output_tokens_per_second": spread(4.0),
                "tokens_per_second": spread(36.0),
            },
        }
    ],
}  # fmt: skip
VLLM = {
    "request_rate": 2.0, "burstiness": 1.0, "max_concurrency": None, "duration": 10.0, "num_prompts": 20,
    "completed": 19, "request_throughput": 1.9, "request_goodput": 1.5, "output_throughput": 240.0,
    "total_token_throughput": 900.0, "mean_ttft_ms": 50.0, "median_ttft_ms": 45.0, "p99_ttft_ms": 90.0,
    "mean_tpot_ms": 10.0, "median_tpot_ms": 9.0,
    "mean_itl_ms": 11.0, "mean_e2el_ms": 1300.0,
}  # fmt: skip
AIPERF = {
    "request_throughput": {"unit": "requests/sec", "avg": 3.0}, "request_count": {"unit": "requests", "avg": 30.0},
    "time_to_first_token": {"unit": "ms", "avg": 20.0, "p50": 19.0, "p95": 30.0, "min": 1},
    "inter_token_latency": {"unit": "ms", "avg": 8.0, "p50": 7.0}, "request_latency": {"unit": "ms", "avg": 500.0},
    "output_token_throughput": {"unit": "tokens/sec", "avg": 200.0},
}  # fmt: skip


def made(tmp_path: Path, held: Any):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(held))
    return imported(path, "snapkv @ 0.5")


def test_guidellm(tmp_path: Path) -> None:
    [row] = made(tmp_path, GUIDELLM)
    assert (row.imported, row.workload, row.requests, row.failed) == ("guidellm", "poisson rate 0.5", 6, 1)
    got = row.metrics
    assert (got["ttft_mean"], got["ttft_p95"]) == (pytest.approx(0.065), pytest.approx(0.195))
    assert got["tpot_mean"] == pytest.approx(0.029)  # not its own time per output token, which counts the first one
    assert got["e2e_p99"] == pytest.approx(1.2) and got["output_per_s"] == 4.0 and got["itl_mean"] is None
    assert set(got) == set(METRICS) and got["j_per_token"] is None


def test_vllm(tmp_path: Path) -> None:
    [row] = made(tmp_path, VLLM)
    got = row.metrics
    assert (row.imported, row.requests, row.failed) == ("vllm bench serve", 19, 1)
    assert (got["ttft_mean"], got["ttft_p50"], got["ttft_p90"]) == (pytest.approx(0.05), pytest.approx(0.045), None)
    assert (got["tpot_p50"], got["itl_mean"], got["e2e_mean"]) == tuple(map(pytest.approx, (0.009, 0.011, 1.3)))
    assert got["goodput_per_s"] == 1.5 and row.technique == "snapkv @ 0.5"


def test_aiperf(tmp_path: Path) -> None:
    [row] = made(tmp_path, AIPERF)
    got = row.metrics
    assert (got["ttft_p95"], got["tpot_mean"], got["e2e_mean"]) == tuple(map(pytest.approx, (0.03, 0.008, 0.5)))
    assert (got["requests_per_s"], got["output_per_s"], got["goodput_per_s"]) == (3.0, 200.0, None)


@pytest.mark.parametrize("held", [{}, [], 3, {"benchmarks": [{}]}, {"mean_ttft_ms": 1}])
def test_other_files_are_refused(tmp_path: Path, held: Any) -> None:
    with pytest.raises(KeepKVError, match=r"result\.json"):
        made(tmp_path, held)
    with pytest.raises(KeepKVError, match="cannot read"):
        imported(tmp_path / "nowhere.json")
