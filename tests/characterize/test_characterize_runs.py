"""Runs: whatever becomes of a point, it is a row, the others go on, and a run that was killed goes on too."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from characterized import grid

from keepkv.characterize.drive.again import Change, again
from keepkv.characterize.drive.run import characterize
from keepkv.characterize.grid.levels import Hardware, Technique
from keepkv.characterize.grid.plan import plan
from keepkv.characterize.record.folder import read
from keepkv.characterize.record.names import METRICS, PAIRED
from keepkv.characterize.record.rows import POINTS, REQUESTS, RESULTS, RUN
from keepkv.characterize.record.summary import drift, summarise
from keepkv.errors import KeepKVError

# A worker that measures nothing: what it answers depends on the point alone.
WORKER = """
import json, os, sys, time
spec = json.loads(sys.stdin.readline())
one = spec["point"]["technique"]
if one["method"] == "crash": raise SystemExit("segmentation fault")
if one["method"] == "memory": os.kill(os.getpid(), 9)
if one["method"] == "late": time.sleep(60)
if one["method"] == "error": print(json.dumps({"error": "unknown", "how": "error"})); raise SystemExit
full, seed = one["method"] == "full", spec["point"]["seed"]
rows = [
    {"point": spec["digest"], "number": i, "family": "facts", "status": "ok", "arrive": i * 0.1, "admit": i * 0.1,
     "times": [i * 0.1 + 0.01 * k * (1 if full else 0.5) for k in range(1, 5)], "end": i * 0.1 + 0.04, "n_in": 50,
     "n_out": 4, "cached": 0, "score": float(full or i % 3 > 0), "reply": str(i), "kv_bytes": 100.0 if full else 50.0,
     "kv_full": 100.0, "kv_logical": 40.0, "kv_tokens": 50.0, "compress_s": 0.0}
    for i in range(12)
]
made = {"model": "m", "device": "cpu", "dtype": "float32", "versions": {"torch": "1"}}
print(json.dumps({
    "requests": rows, "warm": "flat", "unstable": None, "window_s": 2.0, "joules": 30.0, "energy_source": "fake",
    "energy_quality": "low", "energy_why": None, "idle_watts": 5.0, "peak_bytes": 1000, "made_with": made,
}))
"""
COMMAND = [sys.executable, "-c", WORKER]


def run(out: Path, *methods: str, **more: Any):
    asked = grid(techniques=tuple(Technique("snapkv", 0.1 * (i + 1)) for i in range(len(methods) or 2)), **more)
    if not methods:
        return characterize(asked, out, command=COMMAND)
    points = [p for p in _points(asked) if p.role == "baseline"][:1]
    points += [replace(points[0], technique=Technique(name, 0.5), role="point") for name in methods]
    return characterize(asked, out, command=COMMAND, only=points)


def _points(asked):
    return plan(asked).points


def test_crash_memory_and_time_are_rows_and_the_others_go_on(tmp_path: Path) -> None:
    found = run(tmp_path, "crash", "memory", "late", "error", "snapkv", timeout=2.0)
    status = {row.technique: row.status for row in found}
    assert status == {
        "full": "ok", "crash @ 0.5": "crash", "memory @ 0.5": "memory", "late @ 0.5": "timeout", "error @ 0.5": "error",
        "snapkv @ 0.5": "ok",
    }  # fmt: skip
    said = {row.technique: row.error or "" for row in found}
    assert "segmentation fault" in said["crash @ 0.5"] and "2 s" in said["late @ 0.5"]
    assert all(value is None for value in next(r for r in found if r.status == "crash").metrics.values())


def test_everything_that_is_measured_stands_in_the_rows(tmp_path: Path) -> None:
    found = {row.technique: row for row in run(tmp_path)}
    full, other = found["full"], found["snapkv @ 0.1"]
    assert full.value("ratio") == 1.0 and full.value("score_drop") == 0.0 and full.value("length_ratio") == 1.0
    assert other.value("ratio") == 0.5 and other.value("ratio_asked") == pytest.approx(0.1)
    assert other.value("lost") == pytest.approx(1 / 3) == other.value("score_drop") and other.worst_family == "facts"
    assert other.value("tpot_mean") == pytest.approx(0.035 / 3)  # its end is later than its last token
    assert other.value("j_per_output_token") == pytest.approx(30 / 48) and other.energy_quality == "low"
    assert other.value("net_j_per_request") == pytest.approx((30 - 10) / 12)
    run_ = read(tmp_path)
    assert {point.role for point in run_.points} == {"start", "end", "baseline", "point"}
    assert set(drift(run_.points).values()) == {0.0}
    for point in run_.points:
        assert set(point.metrics) == set(METRICS)
        assert all(point.metrics[name] is None for name in PAIRED)
    head = (tmp_path / "results.csv").read_text().splitlines()[0].split(",")
    assert {*METRICS} <= {*head} and "ratio_low" in head
    assert {*METRICS} <= {*(tmp_path / "points.csv").read_text().splitlines()[0].split(",")}


def test_a_run_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole)
    run(cut)
    points = (cut / POINTS).read_text().splitlines(keepends=True)
    (cut / POINTS).write_text("".join(points[:2]) + points[2][:40])  # killed within the third row
    (cut / RESULTS).unlink()
    run(cut)
    for name in (RESULTS, "results.csv", REQUESTS):
        assert (cut / name).read_text() == (whole / name).read_text(), name
    steady = [(cut / name).read_bytes() for name in (POINTS, REQUESTS)]
    run(cut)  # nothing is left to do
    assert [(cut / name).read_bytes() for name in (POINTS, REQUESTS)] == steady


def test_what_was_recommended_is_measured_again(tmp_path: Path) -> None:
    row = next(row for row in run(tmp_path) if row.technique == "snapkv @ 0.2")
    names = ("ratio", "tpot_p50", "leaked")
    [ratio, time] = again(read(tmp_path), row, names, command=COMMAND)  # leaked was never measured
    assert (ratio.name, ratio.before, ratio.now, ratio.share) == ("ratio", 0.5, 0.5, 0.0)
    assert time.share == pytest.approx(0.0) and time.beside == pytest.approx(0.0)
    assert [point.choice for point in read(tmp_path / "again" / row.points[0]).points] == ["full", "snapkv @ 0.2"]


def test_a_slower_machine_is_not_a_change_of_what_was_recommended() -> None:
    change = Change("tpot_p50", before=0.010, now=0.015, base_before=0.020, base_now=0.030)
    assert change.share == pytest.approx(0.5) and change.beside == pytest.approx(0.0)
    worse = Change("tpot_p50", before=0.010, now=0.015, base_before=0.020, base_now=0.020)
    assert worse.beside == pytest.approx(0.5)
    assert Change("score", 1.0, 1.0, base_before=None, base_now=1.0).beside is None
    assert Change("score", 1.0, 1.0, base_before=1.0, base_now=0.0).beside is None


def test_a_directory_takes_one_grid(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(KeepKVError, match="another grid, which differs in rows"):
        run(tmp_path, rows=3)
    (tmp_path / RUN).unlink()
    with pytest.raises(KeepKVError, match=r"without run\.json"):
        run(tmp_path)


def test_nothing_to_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(KeepKVError, match=r"nothing of the grid can be run here.*no device"):
        characterize(grid(hardware=(Hardware("cuda:99"),)), tmp_path)


def test_rows_of_older_schemas_are_read_and_newer_ones_refused(tmp_path: Path) -> None:
    run(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / POINTS).read_text().splitlines()]
    for row in rows:
        row["method"] = row.pop("technique")
        del row["schema"]
    (tmp_path / POINTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {row.technique for row in summarise(tmp_path)} == {"full", "snapkv @ 0.1", "snapkv @ 0.2"}
    rows[0]["schema"] = 99
    (tmp_path / POINTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(KeepKVError, match="take a newer keepkv"):
        summarise(tmp_path)


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(KeepKVError, match="no run of keepkv characterize"):
        read(tmp_path)
