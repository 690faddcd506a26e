"""The arguments of an engine, and the command that serves; needs no vLLM."""

import json
import shlex

import pytest
from typer.testing import CliRunner

from keepkv.cli.program import program
from keepkv.errors import KeepKVError
from keepkv.integrations.vllm import engine_args, serve_flags


def test_arguments_on_cpus_and_gpus() -> None:
    cpu, gpu = engine_args(device="cpu"), engine_args("snapkv", 0.25, device="cuda", window=16)
    assert set(cpu) == {"worker_cls", "scheduler_cls"}
    assert gpu["attention_backend"] == "CUSTOM" and "Async" in gpu["scheduler_cls"]
    assert gpu["additional_config"] == {"keepkv": {"method": "snapkv", "budget": 0.25, "window": 16}}


@pytest.mark.parametrize(
    "given",
    [dict(method="snapk"), dict(budget=3), dict(budget="1GiB"), dict(method="kvzip", budget=0.5), dict(windo=3)],
)
def test_a_default_that_cannot_be_served_is_refused(given: dict[str, object]) -> None:
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
    command = shlex.split(found.output)
    assert command[:3] == ["vllm", "serve", "M"] and command[-2:] == ["--port", "8001"]
    default = json.loads(command[command.index("--additional-config") + 1])["keepkv"]
    assert default == {"method": "snapkv", "budget": "0.25", "window": 16, "every": 32}


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
