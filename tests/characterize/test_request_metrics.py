"""Metrics on timelines made by hand."""

from __future__ import annotations

import pytest
from characterized import APPLICATION, point_row, timeline
from hypothesis import given
from hypothesis import strategies as st

from keepkv.characterize.grid.levels import Hardware, Point, Technique, Workload
from keepkv.characterize.record import metrics
from keepkv.characterize.record.names import METRICS, STATISTICS
from keepkv.characterize.record.samples import of_request, samples

# Due at 1.0, begun at 1.5, tokens at 2.0, 2.1, 2.4, 2.5.
ROW = timeline(0, 1.0, 1.5, [2.0, 2.1, 2.4, 2.5], n_in=10, score=1.0)


def test_times_of_a_request() -> None:
    assert metrics.queue(ROW) == pytest.approx(0.5)
    assert metrics.ttft(ROW) == pytest.approx(1.0)
    assert metrics.service_ttft(ROW) == pytest.approx(0.5)
    assert metrics.tpot(ROW) == pytest.approx(0.5 / 3)
    assert metrics.itl(ROW) == pytest.approx([0.1, 0.3, 0.1])
    assert metrics.e2e(ROW) == pytest.approx(1.5)


def test_one_token_has_no_time_per_token_and_what_is_not_told_is_not_known() -> None:
    one = timeline(0, 1.0, None, [2.0])
    assert (metrics.tpot(one), metrics.itl(one), metrics.queue(one), metrics.service_ttft(one)) == (
        None,
        [],
        None,
        None,
    )
    assert metrics.ttft(one) == pytest.approx(1.0) == metrics.e2e(one)
    cut = timeline(0, 1.0, 1.5)
    assert (metrics.ttft(cut), metrics.e2e(cut), metrics.tpot(cut)) == (None, None, None)


def test_tokens_per_piece_of_text_are_counted_by_the_server() -> None:
    pieces = timeline(0, 0.0, None, [1.0, 2.0], n_out=6)
    assert metrics.tpot(pieces) == pytest.approx(1.0 / 5)
    assert metrics.tokens_in([pieces], 0.0, 1.5) == pytest.approx(3)


def test_throughput_counts_what_came_within_the_window_alone() -> None:
    before = timeline(-1, -2.0, -2.0, [-1.0, 1.0], n_in=5)  # of the warm-up, and half of it in the window
    after = timeline(1, 9.0, 9.0, [9.5, 10.5], n_in=7)  # ends behind it
    found = metrics.rates([before, ROW, after], 0.0, 10.0)
    assert found["output_per_s"] == pytest.approx((1 + 4 + 1) / 10)
    assert found["total_per_s"] == pytest.approx((1 + 4 + 1 + 10 + 7) / 10)
    assert found["requests_per_s"] == pytest.approx(2 / 10)


def test_goodput_asks_for_every_limit_and_failed_requests_keep_none() -> None:
    slow = timeline(1, 1.0, 1.0, [4.0, 4.1])
    failed = timeline(2, 1.0, 1.0, [1.2], status="failed", error="500")
    alone = timeline(3, 1.0, 1.0, [1.2])  # one token: no time per token to keep
    rows = [ROW, slow, failed, alone]
    limits = {"ttft": 1.5, "tpot": 0.2}
    assert metrics.rates(rows, 0.0, 10.0, limits)["goodput_per_s"] == pytest.approx(2 / 10)
    assert metrics.rates(rows, 0.0, 10.0, {"tpot": 0.12})["goodput_per_s"] == pytest.approx(2 / 10)
    assert metrics.rates(rows, 0.0, 10.0)["goodput_per_s"] == pytest.approx(3 / 10)


def test_joules_by_tokens_requests_and_right_answers() -> None:
    """100 W for 3 s and 30 tokens are 10 J a token."""
    rows = [timeline(i, 0.0, 0.0, [0.1 * (k + 1) for k in range(10)], n_in=20, score=float(i > 0)) for i in range(3)]
    found = metrics.energy(rows, 3.0, 300.0, idle_watts=40.0)
    assert found["j_per_output_token"] == pytest.approx(10.0)
    assert found["j_per_token"] == pytest.approx(300 / 90)
    assert found["j_per_request"] == pytest.approx(100.0)
    assert found["j_per_correct"] == pytest.approx(150.0)
    assert found["net_j_per_output_token"] == pytest.approx((300 - 3 * 40) / 30)
    assert found["power_w"] == pytest.approx(100.0)
    assert found["energy_delay_js"] == pytest.approx(100.0 * 1.0)


def test_energy_that_was_not_measured_is_no_number() -> None:
    assert set(metrics.energy([ROW], 3.0, None, 5.0).values()) == {None}
    wrong = metrics.energy([timeline(0, 0.0, 0.0, [0.1], score=0.0)], 3.0, 30.0, None)
    assert wrong["j_per_correct"] is None and wrong["net_j_per_request"] is None and wrong["j_per_request"] == 30.0


def test_a_queue_that_grows_is_told_from_one_that_is_busy() -> None:
    def served(every: float, took: float) -> list:
        rows, free = [], 0.0
        for i in range(40):
            at = i * every
            free = max(free, at) + took
            rows.append(timeline(i, at, free - took, [free]))
        return rows

    assert metrics.queue_grows(served(0.25, 0.5), 10.0)
    assert not metrics.queue_grows(served(0.25, 0.24), 10.0)
    assert not metrics.queue_grows([], 10.0)


@given(st.floats(0.1, 100.0), st.integers(3, 12))
def test_equal_times_are_flat_and_doubling_ones_are_not(value: float, n: int) -> None:
    assert metrics.flat([value] * n)
    assert not metrics.flat([value * (1 + i / n) for i in range(n)])
    assert not metrics.flat([value] * 2)


def test_percentiles_are_of_all_requests_and_failed_ones_are_left_out() -> None:
    rows = [timeline(i, 0.0, 0.0, [float(i + 1), float(i + 2)], n_in=1) for i in range(101)]
    rows.append(timeline(200, 0.0, 0.0, [9999.0], status="failed"))
    rows.append(timeline(-1, 0.0, 0.0, [9999.0, 10000.0]))
    point = Point(APPLICATION, Workload(), Technique(), "none", Hardware())
    found = samples([point_row(point, "p")], {"p": rows}, None)
    shown = {name: found[f"ttft_{name}"].point for name in STATISTICS}
    assert shown == pytest.approx({"mean": 51.0, "p50": 51.0, "p90": 91.0, "p95": 96.0, "p99": 100.0})
    assert found["tpot_p50"].point == pytest.approx(1.0)
    assert set(found) <= set(METRICS)


def test_a_request_tells_its_bytes_and_what_compressing_took() -> None:
    row = timeline(
        0, 0.0, 0.0, [1.0, 2.0], n_in=100, cached=25, kv_bytes=50.0, kv_full=200.0, kv_tokens=100.0, compress_s=0.25
    )
    found = of_request(row)
    assert (found["ratio"], found["kv_bytes_per_token"], found["compress_share"], found["cached_share"]) == (
        0.25, 0.5, 0.25, 0.25,
    )  # fmt: skip
    assert of_request(timeline(0, 0.0, None, [1.0]))["ratio"] is None
