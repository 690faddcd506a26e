"""``keepkv bench --engine``: what is refused before an engine starts, and the picture of its rows; needs no vLLM."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepkv.cli.program import program
from keepkv.integrations.vllm.bench import Load, ServedRow, draw
from keepkv.measure.environment import MadeWith
from keepkv.measure.files import read_rows, write
from keepkv.measure.interval import Percentiles


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--engine", "vllm"], "--cap BYTES"), (["--engine", "vllm", "--cap", "plain@2"], "--cap BYTES"),
     (["--engine", "tgi", "--cap", "1GiB"], "unknown engine 'tgi'"),
     (["--engine", "vllm", "--cap", "1GiB", "-m", "kvzip"], "Use 'keepkv2'"),
     (["--engine", "vllm", "--cap", "1GiB", "-b", "3"], "always keeps"),
     (["--engine", "vllm", "--cap", "1GiB", "-p", "quanto-4"], "unknown peer 'quanto-4'"),
     (["--engine", "vllm", "--cap", "1GiB", "-c", "10", "-c", "20"], "an engine is started for one")],
)  # fmt: skip
def test_what_cannot_be_measured_is_said_in_a_line(words: list[str], said: str) -> None:
    found = CliRunner().invoke(program, ["bench", *words])
    assert found.exit_code == 2 and said in found.output and len(found.output.splitlines()) == 1


def test_rows_are_written_read_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    time = Percentiles.of([2.0, 3.0, 1.0])
    assert time is not None
    load = Load(model="m", requests=4, prompt=100, reply=8, kv_bytes=1 << 20)
    rows = [
        ServedRow(
            label=label, asked=asked, load=load, blocks=20, most_at_once=2, mean_at_once=1.5, steps=3, preemptions=0,
            left_over=0, used=[4, 9, 0], running=[2, 1, 0], seconds=time, throughput=time,
            made_with=MadeWith(model="m", device="cpu", dtype="float32", versions={"vllm": "0.32.0"}),
        )
        for label, asked in (("vllm", {}), ("snapkv 0.25", {"method": "snapkv", "budget": "0.25"}))
    ]  # fmt: skip
    lines, table = write(rows, tmp_path, "bench")
    assert read_rows(tmp_path, "bench.jsonl", ServedRow) == rows
    assert json.loads(lines.read_text().splitlines()[0])["load"]["prompt"] == 100
    assert "seconds_median" in table.read_text().splitlines()[0]
    picture = draw(rows, tmp_path).read_text()
    assert "steps of the engine" in picture and "snapkv 0.25" in picture
