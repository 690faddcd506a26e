"""A training's YAML: what it may say, and what is said of what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepkv.errors import KeepKVError, UnknownName
from keepkv.training.config import Compress, Distill, Sft, example, of_dict, read, to_yaml


@pytest.mark.parametrize("kind", [Distill, Sft])
def test_an_example_is_a_config(kind: type[Distill], tmp_path: Path) -> None:
    path, made = tmp_path / "a.yaml", kind(out="runs/a", compress=Compress(budget=0.05, options={"window": 8}))
    for text in (example(made), to_yaml(made)):
        path.write_text(text, encoding="utf-8")
        assert read(kind, path) == made
    lines = example(made).splitlines()
    assert all("  # " in line for line in lines if not line.startswith("    "))
    assert any(line.startswith("compress:") and "trained for" in line for line in lines)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (
            {"out": "x", "temprature": 1},
            UnknownName,
            "unknown key in a.yaml: 'temprature'. Did you mean 'temperature'?",
        ),
        ({"out": "x", "optimise": {"step": 3}}, UnknownName, "a.yaml, optimise: 'step'. Did you mean 'steps'?"),
        ({"out": "x", "optimise": {"steps": 0}}, KeepKVError, "a.yaml, optimise: Optimise: steps=0 is not"),
        ({"out": "x", "optimise": {"learning_rate": "fast"}}, KeepKVError, "learning_rate='fast' is not"),
        ({"out": "x", "data": 3}, KeepKVError, "a.yaml, data: 3 is not a mapping"),
        ({}, KeepKVError, "a.yaml: no out"),
        (None, KeepKVError, "None is not a mapping"),
    ],
)
def test_what_is_refused(given: object, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said.replace("?", r"\?")):
        of_dict(Distill, given, "a.yaml")


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("out: [", encoding="utf-8")
    with pytest.raises(KeepKVError, match="is not YAML"):
        read(Sft, path)
