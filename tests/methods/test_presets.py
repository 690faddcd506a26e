"""A preset's name stands for a method and options, wherever a method's name is taken."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import zoo
from matrix import calibration
from typer.testing import CliRunner

import keepkv
from keepkv.cli import eval as evaluation
from keepkv.cli import fidelity
from keepkv.cli.arguments import variant
from keepkv.cli.fit import fit
from keepkv.cli.program import program
from keepkv.errors import CalibrationError, KeepKVError
from keepkv.methods import DEFAULT, PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_method(name: str) -> None:
    preset = PRESETS[name]
    mine = keepkv.Cache(zoo.model("llama"), name.upper(), 64).settings.method
    assert mine == keepkv.Cache(zoo.model("llama"), preset.method, 64, **preset.options).settings.method
    assert mine.name == preset.method and preset.work


def test_gates_make_auto_the_method_that_takes_them(tmp_path: Path) -> None:
    """Before, gates beside "auto" were refused as of no use."""
    model, gates = zoo.model("llama"), calibration(("keepkv3", {}), zoo.model("llama"))
    assert gates is not None
    gates.save(tmp_path / "gates.safetensors")
    for given in (gates, str(tmp_path / "gates.safetensors")):
        assert keepkv.Cache(model, "auto", 64, calibration=given).settings.method.name == "keepkv3"
    assert keepkv.Cache(model, "auto", 64, calibration=gates, safeguard=0.3).settings.method.options["safeguard"] == 0.3
    assert variant(f"auto:calibration={tmp_path / 'gates.safetensors'}").method == "keepkv3"
    with pytest.raises(CalibrationError, match="no part of the method uses it"):
        keepkv.Cache(model, "chat", 64, calibration=gates)


def test_options_beside_a_preset_count_more() -> None:
    assert keepkv.Cache(zoo.model("llama"), "auto", 64, window=3).settings.method.window == 3
    assert variant("auto:window=3").options["window"] == 3


def test_the_default_is_the_same_everywhere() -> None:
    model = zoo.model("llama")
    mine = keepkv.Cache(model, budget=64).settings.method
    assert mine == keepkv.Cache(model, DEFAULT, 64).settings.method
    with keepkv.compressed(model, budget=64):
        pass
    assert inspect.signature(keepkv.fit).parameters["method"].default == DEFAULT
    assert inspect.signature(fit).parameters["method"].default == DEFAULT
    assert DEFAULT in evaluation.METHODS and DEFAULT in fidelity.METHODS


def test_an_unknown_name_suggests_presets_too() -> None:
    with pytest.raises(KeepKVError, match="'many-questions'"):
        keepkv.Cache(zoo.model("llama"), "many-question", 64)


def test_advice_is_printed() -> None:
    said = CliRunner().invoke(program, ["methods", "--advise"]).stdout
    listed = json.loads(CliRunner().invoke(program, ["methods", "--advise", "--json"]).stdout)
    assert [one["name"] for one in listed] == list(PRESETS)
    for one in listed:
        assert one["name"] in said and variant(one["takes"]).method == one["method"]
    assert CliRunner().invoke(program, ["methods", "snapkv", "--advise"]).exit_code != 0
