"""`keepkv bench` as a command and as processes: rows, files, and what is said where nothing can be measured."""

from __future__ import annotations

import csv
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_shape import GEOMETRY, SHAPE, TEXT, TOKEN
from typer.testing import CliRunner

from keepkv.bench import roofline
from keepkv.bench.plan import Sweep
from keepkv.bench.plots import draw
from keepkv.bench.protocol import WARM
from keepkv.bench.rows import BenchRow
from keepkv.bench.sizes import largest_batch, row_bytes
from keepkv.bench.systems import System
from keepkv.cli.bench import _number
from keepkv.cli.program import program
from keepkv.measure.files import read_file, write
from keepkv.measure.interval import Percentiles
from keepkv.measure.session import RowFailed, Session

# --- processes -------------------------------------------------------------------------------------------------------


def test_a_process_that_dies_says_why() -> None:
    script = "import sys; sys.stdin.readline(); sys.exit('no luck today')"
    session = Session([sys.executable, "-c", script], {})
    with pytest.raises(RowFailed, match="code 1: no luck today"):
        session.answer()
    session.close()
    killed = Session([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], {})
    with pytest.raises(RowFailed, match="memory ran out"):
        killed.ask(fresh=True)
    killed.close()
    with pytest.raises(RowFailed, match="cannot start"):
        Session(["/nowhere/python"], {})


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A real sweep with everything that fails in it: two processes that measure."""
    out = tmp_path_factory.mktemp("sweep")
    words = ["bench", "--shape", TEXT, "-m", "streaming-llm", "-b", "0.25", "-c", "96", "-p", "plain"]
    words += ["-p", "kvpress:snapkv", "--kvpress-python", "/nowhere/python", "--cap", "plain@2", "--no-overhead"]
    words += ["--new", "2", "--repeats", "2", "--prefills", "1", "--together", "8"]
    words += ["--out", str(out), "--plots", "--json"]
    device = ["--device", "cpu", "--device", "cuda:99"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keepkv.bench.plan.Sweep", partial(Sweep, probe=1 << 20))
        return CliRunner().invoke(program, [*words, *device]), out


def test_sweep_goes_on_where_rows_fail(sweep: tuple[Any, Path]) -> None:
    result, _ = sweep
    assert result.exit_code == 2 and "4 of 6 rows failed" in result.stderr
    rows = json.loads(result.stdout)
    here, nowhere = rows[:3], rows[3:]
    errors = {row["label"]: row["error"] for row in here if row["error"]}
    assert set(errors) == {"kvpress:snapkv"} and "cannot start" in errors["kvpress:snapkv"]
    assert len(nowhere) == 3 and all("cuda:99" in row["error"] for row in nowhere)


def test_rows_are_complete(sweep: tuple[Any, Path]) -> None:
    rows = json.loads(sweep[0].stdout)
    plain, ours = (row for row in rows if not row["error"])
    unset = {name for name, value in ours.items() if value is None}
    here = {name for name in ("revision", "energy", "peak_bytes", "base_bytes") if ours[name] is None}
    assert unset == {"store", "chunk", "per_layer", "error"} | here
    new = WARM + 2
    assert (plain["batch"], plain["cache_bytes"], plain["cap"]) == (2, 2 * (96 + new) * TOKEN, 2 * (96 + new) * TOKEN)
    assert ours["batch"] == largest_batch(
        ours["cap"], row_bytes(GEOMETRY, System("keepkv", "streaming-llm", 0.25), 96, new)
    )
    assert ours["fits"] and ours["batch"] > 2 and ours["slots"] == 24 + new
    for row in (plain, ours):
        read = row["weight_bytes"] + row["slot_bytes"] + row["vote_bytes"]
        assert row["weight_bytes"] == roofline.weight_bytes(SHAPE.config(), torch.float32, row["batch"])
        assert row["floor"] == pytest.approx(read / row["bandwidth"])
        assert len(row["decode"]["values"]) == 2 and len(row["prefill"]["values"]) == 1
        fast = zip(row["throughput"]["values"], row["decode"]["values"], strict=True)
        assert all(tokens * seconds == pytest.approx(row["batch"]) for tokens, seconds in fast)
        assert row["peak_bytes"] is None or row["peak_bytes"] >= row["base_bytes"] > 0
        assert {"torch", "transformers", "keepkv", "python"} <= row["versions"].keys()
    assert plain["speedup"]["values"] == [1.0, 1.0]
    assert ours["ratio"] == pytest.approx(ours["cache_bytes"] / ours["full_bytes"])


def test_files_of_a_sweep(sweep: tuple[Any, Path]) -> None:
    result, out = sweep
    assert {path.name for path in out.iterdir()} == {
        "bench.jsonl", "bench.csv", "bench-latency.svg", "bench-throughput.svg", "bench-memory.svg"
    }  # fmt: skip
    rows = read_file(out / "bench.jsonl", BenchRow)
    assert json.loads(json.dumps([row.to_dict() for row in rows])) == json.loads(result.stdout)
    with (out / "bench.csv").open(encoding="utf-8") as file:
        flat = list(csv.DictReader(file))
    assert [row["label"] for row in flat] == [row.label for row in rows]
    assert float(flat[0]["decode_median"]) == pytest.approx(rows[0].decode.median if rows[0].decode else None)
    assert "streaming-llm" in (out / "bench-memory.svg").read_text("utf-8")


def test_failed_rows_alone_draw_nothing(sweep: tuple[Any, Path], tmp_path: Path) -> None:
    failed = [row for row in read_file(sweep[1] / "bench.jsonl", BenchRow) if row.error]
    assert draw(failed, tmp_path) == []
    assert [path.name for path in write(failed, tmp_path, "bad")] == ["bad.jsonl", "bad.csv"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shape", "layers=2"], "lacks"),
        (["--cap", "plain@2", "--batch", "2"], "either --cap or --batch"),
        (["--plots"], "--out DIRECTORY"),
        (["--repeats", "0"], "at least 1"),
        (["--dtype", "float8"], "bfloat16"),
        (["-b", "1.5"], "share"),
        (["--store", "densest"], "Did you mean 'dense'"),
        (["--store", "static:capacity=lots"], "static:capacity=512"),
        (["-m", "snapvk"], "Did you mean 'snapkv'"),
        (["-m", "snapkv:windw=3"], "Did you mean 'window'"),
        (["-p", "plainn"], "Did you mean 'plain'"),
        (["-p", "kvpress:snapkv"], "--kvpress-python"),
    ],
)
def test_one_line_where_nothing_can_be_measured(words: list[str], said: str) -> None:
    result = CliRunner().invoke(program, ["bench", *words])
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1


def test_numbers_are_written_as_people_do() -> None:
    """Before: 1.006e+04."""
    shown = {10060.4: "10,060", 202800: "202,800", 3.14159: "3.142", 0.0: "0", 0.00021: "0.000210", 96.5: "96.50"}
    assert {value: _number(Percentiles.of([value])) for value in shown} == shown and _number(None) == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "/nowhere/model"], "/nowhere/model"),
        (["-c", "9000"], "reads"),
        (["--cap", "1KiB", "-c", "100"], "more than the cap"),
        (["--cap", "lots"], "plain@N"),
        (["-b", "1MiB", "--cap", "1GiB"], "share or slots"),
        (["--batch", "100000000"], "not enough memory"),
    ],
)
def test_a_line_for_a_row_that_cannot_be_measured(words: list[str], said: str) -> None:
    result = CliRunner().invoke(program, ["bench", "-p", "none", "--no-overhead", "--device", "cpu", *words])
    assert result.exit_code == 2 and "1 of 1 rows failed" in result.stderr, result.output
    assert said in result.stderr and "failed" in result.stdout
