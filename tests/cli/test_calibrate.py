"""``keepkv calibrate`` end to end on a tiny random model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from published import kvzap_files, shape_of
from test_cli import TEXT, run, tiny  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

import keepkv
from keepkv.calibrate import KINDS, Found, batches
from keepkv.engine.versions import CACHE
from keepkv.errors import CalibrationError


def test_measures_saves_and_serves_generate(tiny: str, tmp_path: Path) -> None:  # noqa: F811
    out, text = str(tmp_path / "new" / "queries.safetensors"), tmp_path / "a text.txt"
    text.write_text(TEXT, encoding="utf-8")
    words = ["calibrate", "query-statistics", "--model", tiny, "--text", str(text), "--tokens", "200", "--length", "64"]
    told = json.loads(run(*words, "--out", out, "--json").stdout)
    found = keepkv.Calibration.load(out)
    assert told["kind"] == found.kind == "query-statistics" and told["digest"] == found.digest
    assert told["bytes"] == Path(out).stat().st_size and told["layers"] == [0, 1]
    assert found.made_with["tokens"] == 200 and found.tensors[0]["query_count"] == 200 - 4 * 4  # four pieces
    assert found.made_with["command"] == shlex.join(["keepkv", *words, "--out", out])
    again = run(*words, "--out", out)
    assert f"wrote {out}" in again.stdout and "2 layers from 200 tokens" in again.stdout
    assert keepkv.Calibration.load(out).digest == found.digest
    ask = ["generate", "--model", tiny, "--prompt", TEXT, "--max-new-tokens", "4", "-b", "0.3"]
    ask += ["-m", "expected-attention", "-o", "statistics=stored"]
    assert json.loads(run(*ask, "-o", f"calibration={out}", "--json").stdout)["receipt"]["ratio"] < 0.5
    refused = run(*ask, code=2).stderr
    assert f"keepkv calibrate query-statistics --model {tiny} --text FILE" in refused


def test_the_embedded_model_and_its_document_if_nothing_is_said(tmp_path: Path) -> None:
    out = str(tmp_path / "queries.safetensors")
    told = json.loads(run("calibrate", "query-statistics", "--out", out, "--tokens", "300", "--json").stdout)
    model = AutoModelForCausalLM.from_pretrained(keepkv.embedded_model())
    cache = keepkv.Cache(model, "expected-attention", 32, statistics="stored", calibration=out)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 103)[None], **{CACHE: cache})
    assert told["layers"] == [0, 1, 2, 3] and cache.report().compressed


def test_errors_are_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    out, empty = tmp_path / "queries.safetensors", tmp_path / "empty.txt"
    empty.write_text("")
    assert "Did you mean 'query-statistics'?" in run("calibrate", "query-statistic", "--out", str(out), code=2).stderr
    assert "empty" in run("calibrate", "query-statistics", "--text", str(empty), "--out", str(out), code=2).stderr
    assert not out.exists()


def test_help_shows_kinds_and_examples() -> None:
    output = run("calibrate", "--help").output
    said, examples = output.split("Examples:")
    assert not [kind for kind in KINDS if f"{kind}:" not in said] and "keepkv calibrate" in examples


def test_a_kind_has_options_and_says_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(model: object, batches: Iterable[torch.Tensor], times: int = 1) -> Found:
        tokens = times * sum(ids.numel() for ids in batches)
        return Found({0: {"count": torch.tensor(tokens)}}, {"tokens": tokens}, [f"{tokens} tokens"])

    monkeypatch.setitem(KINDS._factories, "counted", counted)
    words, out = ["calibrate", "counted", "--tokens", "100", "-o", "times=3"], str(tmp_path / "counted.safetensors")
    assert "300 tokens\nwrote" in run(*words, "--out", out).stdout
    made = keepkv.Calibration.load(out).made_with
    assert made["options"] == {"times": 3} and made["found"] == {"tokens": 300} and "-o times=3" in made["command"]
    assert json.loads(run(*words, "--out", out, "--json").stdout)["made_with"]["says"] == ["300 tokens"]
    assert "Its options: times" in run(*words[:-1], "rank=3", "--out", out, code=2).stderr
    assert "'x' is not a whole number" in run(*words[:-1], "times=x", "--out", out, code=2).stderr


def test_tada_says_whether_it_pays(tiny: str, tmp_path: Path) -> None:  # noqa: F811
    out, text = str(tmp_path / "tada.safetensors"), tmp_path / "a.txt"
    text.write_text(TEXT * 4, encoding="utf-8")
    words = ["calibrate", "tada", "--model", tiny, "--text", str(text), "--tokens", "400", "--length", "32"]
    said = run(*words, "-o", "bits=4", "-o", "proposals=4", "--out", out).stdout
    assert "TaDA does not pay on this model" in said and "written: greedy" in said and f"wrote {out}" in said
    assert "too few" in run(*words[:-3], "400", "--length", "200", "--out", out, code=2).stderr


def test_heads_are_measured_and_used(tmp_path: Path) -> None:
    """On the model in the package; then a prompt is compressed by what was found."""
    out, pattern = str(tmp_path / "heads.safetensors"), tmp_path / "full_attention_heads.tsv"
    said = run("calibrate", "heads", "--tokens", "3300", "--length", "300", "--out", out).stdout
    assert "answers were known" in said and "inf" in said and f"wrote {out}" in said
    found = keepkv.Calibration.load(out).made_with
    assert 3000 <= found["tokens"] < 3300 and found["options"]["needles"] == found["found"]["runs"] >= 10
    ask = ["generate", "--prompt", TEXT * 3, "--max-new-tokens", "4", "-b", "0.3", "-m", "surface-logic-kv", "--json"]
    receipt = json.loads(run(*ask, "-o", f"calibration={out}", "-o", "behaviour=copy_vs_compose").stdout)["receipt"]
    assert receipt["ratio"] < 0.5
    pattern.write_text("0.9\t0.1\n" * 4)
    said = run("calibrate", "heads", "-o", f"pattern={pattern}", "--out", out).stdout
    assert "full of 4 layers" in said and keepkv.Calibration.load(out).tensors[3]["heads_full"].tolist()[0] > 0.8


def test_texts_take_turns_and_every_piece_begins_as_a_text_does() -> None:
    tokenizer = AutoTokenizer.from_pretrained(keepkv.embedded_model())
    long, short = "The cat sat on the mat. " * 40, "A dog ran."
    made = batches(tokenizer, [long, short], 10**6, 16)
    assert all(1 < ids.shape[1] <= 16 and ids[0, 0] == tokenizer.bos_token_id for ids in made)
    assert tokenizer.decode(made[1][0, 1:]) == short  # behind the first piece of the long one
    rest = torch.cat([ids[0, 1:] for i, ids in enumerate(made) if i != 1])
    assert rest.tolist() == tokenizer.encode(long, add_special_tokens=False)
    few = batches(tokenizer, [long, short], 21, 16)
    assert [ids.shape[1] for ids in few] == [16, min(5, made[1].shape[1])]
    with pytest.raises(CalibrationError, match="empty"):
        batches(tokenizer, ["", ""], 100, 16)


def test_the_command_reads_what_was_published(tiny: str, tmp_path: Path) -> None:  # noqa: F811
    layers, heads, _, width = shape_of(AutoModelForCausalLM.from_pretrained(tiny))
    folder, out = kvzap_files(tmp_path / "KVzap", layers, heads, width, 5), str(tmp_path / "kvzap.safetensors")
    words = ["calibrate", "kvzap", "--model", tiny, "--from", str(folder)]
    told: dict[str, Any] = json.loads(run(*words, "--out", out, "--json").stdout)
    assert told["kind"] == "kvzap" and told["made_with"]["published"] == str(folder)
    assert told["made_with"]["command"] == f"keepkv calibrate kvzap --model {tiny} --from {folder} --out {out}"
    assert f"kvzap of {layers} layers from {folder}" in run(*words, "--out", out).stdout
    ask = ["generate", "--model", tiny, "--prompt", TEXT, "--max-new-tokens", "4", "-b", "0.3", "-m", "kvzap"]
    assert json.loads(run(*ask, "-o", f"calibration={out}", "--json").stdout)["receipt"]["ratio"] < 0.6
    assert "leave --text and --option out" in run(*words, "--out", out, "-o", "noise=1", code=2).stderr
    assert "cannot read" in run(*words[:-1], str(tmp_path / "none"), "--out", out, code=2).stderr
