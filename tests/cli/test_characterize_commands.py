"""The verbs characterize, recommend and tune."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from characterized import made_up_run
from typer.testing import CliRunner

from keepkv.cli.program import program

GRID = "applications: [{tasks: [niah-single-1]}]\nmethods: [{method: snapkv, budget: [0.25, 0.5]}]\n"


def said(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(program, list(words))
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made_up_run(tmp_path / "run", joules=50.0)


def test_a_plan_is_shown_without_running_anything(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(GRID + "weights: [none, torchao-int8]\n")
    text = said("characterize", str(file), "--plan", "--out", str(tmp_path / "out"))
    assert "snapkv @ 0.25" in text and "baseline" in text and "torchao is not installed" in text
    held = json.loads(said("characterize", "--profile", "quick", "--plan", "--json"))
    assert len(held["points"]) == 8 and held["seconds"] > 0
    assert not (tmp_path / "out").exists()


def test_what_is_asked_for_wrongly_is_said(tmp_path: Path) -> None:
    assert "give a grid file" in said("characterize", code=2)
    assert "there is quick" in said("characterize", "--profile", "slow", code=2)
    assert "no run of keepkv characterize" in said("recommend", str(tmp_path), code=2)


def test_results_of_other_tools_are_added(tmp_path: Path) -> None:
    file, out = tmp_path / "vllm.json", tmp_path / "out"
    file.write_text(json.dumps({"request_throughput": 1.9, "mean_ttft_ms": 50.0, "completed": 3, "request_rate": 2.0}))
    held = json.loads(said("characterize", "--results", str(file), "--out", str(out), "--json"))
    said("characterize", "--results", str(file), "--out", str(out))  # once more changes nothing
    assert held[0]["metrics"]["requests_per_s"]["mean"] == 1.9
    assert len((out / "points.jsonl").read_text().splitlines()) == 1 and (out / "report.html").is_file()


def test_recommend_says_what_to_take_and_fails_where_nothing_fits(run: Path) -> None:
    text = said("recommend", str(run), "--limit", "ratio<=0.9", "--objective", "score")
    assert "take keepkv @ 0.25" in text and (run / "recommendation.html").is_file()
    assert "binds" in said("recommend", str(run), "-l", "ratio<=0.01", code=1)
    found = json.loads(said("recommend", str(run), "--json"))
    assert found[0]["pick"]["technique"] in ("full", "snapkv @ 0.5", "keepkv @ 0.25")


def test_tune_has_three_studies(run: Path, tmp_path: Path) -> None:
    assert "schedule" in said("tune", "--help")
    text = said("tune", "capacity", str(run), "--rate", "10", "--memory", "10MiB", "--weights", "1MiB")
    assert "machines" in text and (run / "capacity.html").is_file()
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps({"at": 0.7 * i, "n_out": 8}) + "\n" for i in range(60)))
    text = said("tune", "schedule", str(run), "--trace", str(trace), "--every", "10")
    assert "schedule:" in text and (run / "schedule.html").is_file()
    file = tmp_path / "grid.yaml"
    file.write_text("applications: [{tasks: [niah-single-1]}]\n")
    assert "needs methods" in said("tune", "search", str(file), code=2)
