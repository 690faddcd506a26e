"""The kernel benchmark runs from end to end, and without a GPU says so."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import kernel_times as benchmark


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (extra 'triton')")
def test_every_kernel_is_measured_beside_its_reference(tmp_path: Path) -> None:
    assert benchmark.main(["--tiny" if torch.cuda.is_available() else "--interpret", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "kernels.json").read_text())
    rows = written["rows"]
    assert {row["kernel"] for row in rows} == set(benchmark.SHAPES)
    for row in rows:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["runs"] >= 3
        assert row["floor_ms"] == pytest.approx(row["bytes"] / written["copy_gb_per_s"] / 1e6)
        assert row["times_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"])
        measured = {
            other["way"] for other in rows if (other["kernel"], other["variant"]) == (row["kernel"], row["variant"])
        }
        assert {"reference", "triton"} <= measured
        if row["way"] == "triton":
            assert row["error"] < 0.02
    with (tmp_path / "kernels.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (tmp_path / "kernels.md").read_text().count("\n| ") == len(rows) + 1
    assert {"device", "torch", "triton", "revision", "time"} <= set(written)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([]) == 1
    assert capsys.readouterr().out.count("\n") == 1


def test_the_shape_to_be_judged_by() -> None:
    shape = benchmark.SHAPES["decode_attention"][0]
    assert (shape.rows, shape.slots, shape.heads, shape.groups, shape.dim) == (16, 32768, 8, 4, 128)
    assert shape.dtype == torch.bfloat16
