"""``keepkv check``: versions, a model, a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as t
from typer.testing import CliRunner

import keepkv
from keepkv.cli.program import program
from keepkv.engine import versions


def run(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(program, ["check", *args])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    t.LlamaConfig(num_hidden_layers=3).save_pretrained(tmp_path)
    return tmp_path


def test_versions() -> None:
    found = json.loads(run("--json").stdout)
    assert found["versions"]["transformers"] == t.__version__ and found["tested"].keys() == {"torch", "transformers"}
    assert keepkv.__version__ in run().stdout and "tested:" in run().stdout


def test_a_version_that_is_newer_than_any_tested_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "untested", lambda: "transformers 9.9 is newer")
    assert "9.9" in run().stdout and "9.9" in json.loads(run("--json").stdout)["note"]


def test_a_directory_and_a_file(llama: Path) -> None:
    for where in (llama, llama / "config.json"):
        assert "all 3 layers" in run(str(where)).stdout
        layers = json.loads(run(str(where), "--json").stdout)["layers"]
        assert [x["compressed"] for x in layers] == [True] * 3 and layers[0]["heads"] == 32


def test_a_refused_model_has_exit_code_one(tmp_path: Path) -> None:
    t.BloomConfig(n_layer=2).save_pretrained(tmp_path)
    assert "attention interface" in " ".join(run(str(tmp_path), code=1).stdout.split())
    assert json.loads(run(str(tmp_path), "--json", code=1).stdout)["layers"] == []


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for where in (str(tmp_path / "none"), str(tmp_path)):
        error = run(where, code=2).stderr
        assert error.startswith("error: ") and error.count("\n") == 1
