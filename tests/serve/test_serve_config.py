"""The configuration of a server: a file, flags, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepkv.errors import KeepKVError
from keepkv.serve.config import Config, read_config


def test_a_file_and_flags_that_go_before_it(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "port: 8001\nbudget: 0.25\nmemory: 2GiB\nmax_prompt: 32k\nmethods: [snapkv, adakv]\nmethod: snapkv\n"
    )
    read = read_config(file, {"port": 9, "rows": None})
    assert (read.port, read.budget, read.memory, read.max_prompt, read.rows) == (9, 0.25, 2 << 30, 32 << 10, 16)
    settings = read.settings
    assert settings.methods == ("snapkv", "adakv") and settings.compression.budget == 0.25
    assert (settings.memory, settings.prompt, settings.budget) == (2 << 30, 32 << 10, 1.0)


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("")
    assert read_config(file) == read_config() == Config()
    assert Config().loopback and Config().served == "keepkv-embedded"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot: 1", "unknown field 'prot'. Known: model"),
        ("port: 70000", "port: "),
        ("memory: lots", "memory: memory='lots' is no amount of memory"),
        ("max_budget: 1.5", "max_budget: budget=1.5"),
        ("max_reply: -1", "max_reply: "),
        ("grace: .nan", "grace: "),
        ("- port", "expected fields and their values"),
        ("port: [", "is not YAML"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(KeepKVError) as refused:
        read_config(file)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeepKVError, match=r"no\.yaml.*No such file"):
        read_config(tmp_path / "no.yaml")


def test_a_budget_or_a_method_that_is_none_is_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(KeepKVError, match="budget='half'"):
        _ = read_config(None, {"budget": "half"}).settings


def test_the_key_is_not_shown() -> None:
    assert "secret" not in repr(read_config(None, {"api_key": "secret"}))


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)]
)
def test_who_can_connect(host: str, local: bool) -> None:
    assert read_config(None, {"host": host}).loopback is local
