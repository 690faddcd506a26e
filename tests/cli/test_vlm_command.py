"""``keepkv eval --vlm``: the model in the package on its scenes, reducers beside methods, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keepkv.cli import arguments
from keepkv.cli.program import program
from keepkv.errors import KeepKVError
from keepkv.report import arrange, read
from keepkv.report.page import data

pytestmark = pytest.mark.filterwarnings("ignore:.* items of each task", "ignore:of .* tokens, a budget of")


def run(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(program, ["eval", "--vlm", *args])
    assert result.exit_code == code, result.output
    return result


def test_scenes_in_one_command(tmp_path: Path) -> None:
    options = ["-t", "scene-now", "-l", "120", "--items", "2", "-m", "visionzip", "-m", "vl-cache", "-b", "0.5"]
    said = json.loads(run(*options, "--window", "4", "--json", "--out", str(tmp_path)).stdout)
    methods = {row["method"] for row in said["cells"]}
    assert methods == {"full", "random", "snapkv", "visionzip", "vl-cache"}
    assert not [row["error"] for row in said["cells"] if row["error"]]
    bench = {row["method"]: row for row in said["bench"]}
    assert bench["full"]["loyalty"]["micro"] == 100.0
    for name in methods - {"full"}:
        assert bench[name]["entries"] <= 0.5 * bench["full"]["entries"] <= bench[name]["entries"] + 1
    report = arrange(read(tmp_path))
    texts = data(report)["maps"]["texts"]
    assert texts[0]["grid"] == [3, 3] and len(texts[0]["vision"]) % 9 == 0
    shown = run(*options, "--window", "4", "--out", str(tmp_path)).stdout  # nothing is left to run
    assert "entries" in shown and "loyalty" in shown and "OP" in shown


def test_what_is_refused() -> None:
    assert "cannot be mixed" in run("-t", "qa-1", code=2).output
    assert "takes no options" in run("-t", "scene-now", "-m", "visionzip:count=3", code=2).output
    assert "HEIGHTxWIDTH" in run("-t", "scene-now", "--size", "large", code=2).output
    with pytest.raises(KeepKVError, match="visionzip"):
        arguments.variant("visionzip")  # of a model that reads alone
    assert arguments.size("224x336") == (224, 336) and arguments.size(None) is None
