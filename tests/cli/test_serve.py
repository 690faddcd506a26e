"""``keepkv serve``: flags and fields are the same, what is whose, and a server that comes and goes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from typer.testing import CliRunner

from keepkv.cli.program import program
from keepkv.serve.config import Config

RUNNER = CliRunner()


def said(*words: str) -> tuple[int, str]:
    done = RUNNER.invoke(program, ["serve", *words], env={"COLUMNS": "200", "KEEPKV_API_KEY": ""})
    return done.exit_code, " ".join(done.output.split())


def test_every_field_has_a_flag_of_its_name() -> None:
    code, text = said("--help")
    flags = set(re.findall(r"--[a-z][a-z-]+", text))
    assert (
        code == 0
        and {f"--{name.replace('_', '-')}" for name in Config.model_fields} - {"--model", "--options"} <= flags
    )
    assert "keepkv serve ./my-model --config serve.yaml" in text


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--memory", "lots"], "memory='lots' is no amount of memory"),
        (["--budget", "half"], "budget='half'"),
        (["--method", "snapvk:window=3", "-b", "0.5"], "Did you mean 'snapkv'"),
        (["--port", "99999"], "port: "),
        (["--config", "/nowhere.yaml"], "cannot read '/nowhere.yaml'"),
        (["--show"], "--engine vllm"),
        (["--engine", "vlm"], "Did you mean 'vllm'"),
        (["m", "--engine", "vllm", "--rows", "4"], "--rows is of keepkv's own server"),
        (["--engine", "vllm"], "needs a model"),
        (["/nowhere/model"], "no model directory"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(words: list[str], answer: str) -> None:
    code, text = said(*words)
    assert code == 2 and answer in text and text.count("error:") == 1


def test_vllm_is_started_as_before() -> None:
    code, text = said(
        "./x", "--engine", "vllm", "-m", "snapkv:window=16", "-b", "1024", "--every", "256", "--device", "cpu",
        "--show", "--", "--port", "8001",
    )  # fmt: skip
    assert code == 0 and text.startswith("vllm serve ./x") and text.endswith("--port 8001")
    assert "snapkv" in text and "1024" in text and "256" in text and "window" in text


@pytest.mark.slow
def test_a_server_says_what_it_serves_and_stops_when_told(tmp_path: Path) -> None:
    """The command itself: the line at the start, a context that outlives a kill, and an end in good order."""
    command = [sys.executable, "-m", "keepkv", "serve", "--port", "0", "--memory", "64MiB", "--budget", "0.5"]
    command += ["--contexts", str(tmp_path / "contexts")]

    def begin() -> tuple[subprocess.Popen[str], str]:
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        assert server.stdout is not None
        line = server.stdout.readline()
        assert "keepkv-embedded" in line and "50% of the tokens by many-questions" in line and "64 MiB" in line, line
        return server, line.split()[0]

    def ask(url: str, path: str, body: dict[str, object] | None = None) -> dict[str, object]:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{url}{path}", data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=120) as answer:
            found: dict[str, object] = json.load(answer)
        return found

    server, url = begin()
    made = ask(url, "/v1/contexts", {"name": "kept", "text": "The code of amber falcon is 4821. " * 20})
    server.send_signal(signal.SIGKILL)
    server.wait(30)
    server, url = begin()
    found = ask(url, "/v1/contexts/kept")
    assert {**found, "in_memory": True, "keepkv": None} == {**made, "in_memory": True, "keepkv": None}
    asked = {
        "messages": [{"role": "user", "content": "What is the code of amber falcon?"}],
        "keepkv": {"context": "kept"},
    }
    reply = ask(url, "/v1/chat/completions", {**asked, "max_tokens": 6, "temperature": 0})
    assert "4821" in json.dumps(reply)
    server.send_signal(signal.SIGTERM)
    assert server.wait(120) == 0
