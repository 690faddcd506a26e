"""``keepkv train`` on a tiny random model, and its one-line refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import run, tiny  # noqa: F401

from keepkv.cli.train import KINDS


def test_trains_from_a_file_of_texts(tiny: str, tmp_path: Path) -> None:  # noqa: F811
    data, path = tmp_path / "texts.jsonl", tmp_path / "sft.yaml"
    lines = [{"prompt": "The river runs past the old mill. " * 3, "reply": " It does, and on."}] * 3
    data.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    path.write_text(
        f"out: {tmp_path / 'run'}\nmodel: {tiny}\ndevice: cpu\n"
        "compress: {budget: 8, options: {window: 2, sinks: 1}}\n"
        f"data: {{source: {data}}}\noptimise: {{steps: 2, batch: 2}}\n",
        encoding="utf-8",
    )
    told = json.loads(run("train", "sft", str(path), "--json").stdout)
    assert told["steps"] == 2 and told["texts"] == 3 and told["evicted"] > 0 and len(told["losses"]) == 2
    again = run("train", "sft", str(path)).stdout
    assert "2 steps, on from step 2 over 3 texts" in again and "wrote" in again


def test_reinforcement_learning(tiny: str, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("trl")
    data, path = tmp_path / "sums.jsonl", tmp_path / "rl.yaml"
    data.write_text('{"prompt": "The river runs past the old mill.", "reply": "It does."}\n', encoding="utf-8")
    path.write_text(
        f"out: {tmp_path / 'run'}\nmodel: {tiny}\ndevice: cpu\nreward: exact\nreply: 6\nsamples: 2\n"
        "compress: {method: streaming-llm, budget: 8, every: 2}\n"
        f"data: {{source: {data}}}\noptimise: {{steps: 2, batch: 2}}\n",
        encoding="utf-8",
    )
    told = json.loads(run("train", "rl", str(path), "--json").stdout)
    assert told["steps"] == 2 and told["prompts"] == 1 and len(told["rewards"]) == 2 and min(told["evicted"]) > 0
    again = run("train", "rl", str(path)).stdout
    assert "2 steps, on from step 2 over 1 prompts: reward 0 → 0" in again
    path.write_text(path.read_text(encoding="utf-8").replace("exact", "exakt"), encoding="utf-8")
    assert "Did you mean 'exact'?" in run("train", "rl", str(path), code=2).stderr


@pytest.mark.parametrize("kind", KINDS)
def test_prints_an_example(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(run("train", kind, "--example").stdout.replace("steps:", "stps:"), encoding="utf-8")
    assert "Did you mean 'steps'?" in run("train", kind, str(path), code=2).stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["distil"], "Did you mean 'distill'?"),
        (["sft"], "`keepkv train sft --example` prints one"),
        (["sft", "nowhere.yaml"], "cannot read 'nowhere.yaml'"),
    ],
)
def test_refuses_in_one_line(words: list[str], said: str) -> None:
    told = run("train", *words, code=2).stderr
    assert said in told and len(told.strip().splitlines()) == 1
