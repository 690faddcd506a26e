"""``keepkv.fit`` and ``keepkv fit``: what fits, what to set, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
import zoo
from typer.testing import CliRunner

import keepkv
from keepkv.calibrate import calibrate
from keepkv.cli.program import program
from keepkv.engine.versions import CACHE
from keepkv.plan import dry
from keepkv.plan.live import Live
from keepkv.plan.network import Network
from keepkv.plan.units import read_bytes, read_tokens

LLAMA = t.LlamaConfig(
    vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64, max_position_embeddings=8192, dtype="float32",
)  # fmt: skip
ASKED: dict[str, Any] = {"method": "streaming-llm", "chunk": 512}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    LLAMA.save_pretrained(tmp_path)
    return str(tmp_path)


def run(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(program, ["fit", *args])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_the_simplest_way_that_fits_is_set() -> None:
    peaks = keepkv.fit(LLAMA, "4k", memory=1, **ASKED)
    full, ours = peaks.full, peaks.compressed
    assert ours is not None and ours.chunked_peak < min(ours.peak, full.chunked_peak) and ours.peak < full.peak
    assert peaks.way is None and "weights alone" in peaks.sentence
    said = {
        "full": (full.peak, "even the full cache"),
        "compressed": (ours.peak, "it fits in"),
        "compressed in chunks": (ours.chunked_peak, "chunks of 512"),
    }
    for way, (memory, words) in said.items():
        found = keepkv.fit(LLAMA, "4k", memory=memory, **ASKED)
        assert found.way == way and words in found.sentence, found.sentence
        assert found.fits and ("prefill_chunk_size" in found.python) == ("chunks" in way)
        if way == "compressed":  # as long as was asked, to one per cent
            assert found.compressed is not None and 4096 * 0.98 < (found.compressed.longest or 0) < 4096 * 1.02


def test_a_smaller_budget_is_found() -> None:
    least = keepkv.fit(LLAMA, "4k", memory=1, budget=0.05, **ASKED).compressed
    assert least is not None
    found = keepkv.fit(LLAMA, "4k", memory=int(least.chunked_peak * 1.02), budget=0.9, **ASKED)
    assert not found.fits and found.smaller is not None and 0.03 <= found.smaller <= 0.1
    assert f"At a budget of {found.smaller:g} it fits" in found.sentence
    assert f"budget={found.smaller:g}" in found.python and f"--budget {found.smaller:g}" in found.command


@pytest.mark.parametrize("chunk", [None, 256])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_peak_is_that_of_tensors_alive(name: str, chunk: int | None) -> None:
    """``benchmarks/fit`` compares with the allocator, in processes of their own."""
    model, tokens = zoo.model(name), 1024
    found = keepkv.fit(model.config, tokens, method="streaming-llm", budget=0.2, memory=1, chunk=256, dtype="float32")
    said = (found.full.peak if chunk is None else found.full.chunked_peak) - found.weights
    ids = torch.ones(1, tokens, dtype=torch.long)
    with torch.no_grad(), Live() as live:
        cache = t.DynamicCache(config=model.config)
        for piece in ids.split(chunk or tokens, dim=1):
            model(input_ids=piece, logits_to_keep=1, **{CACHE: cache})
    assert said == pytest.approx(live.peak, rel=0.05)


def test_a_model_that_lives_with_the_configuration_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last cache may go at any moment, and puts back what the configuration says of its attention."""
    model = zoo.model("llama")
    read, before = Network.read, model.config._attn_implementation

    def meanwhile(*given: Any) -> Any:
        keepkv.Cache(model, "streaming-llm", 0.5)
        assert model.config._attn_implementation == before
        return read(*given)

    monkeypatch.setattr(Network, "read", meanwhile)
    assert keepkv.fit(model.config, 64, method="streaming-llm", budget=0.5, memory="1GiB").refused is None


def test_the_tiles_that_are_left_out_take_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"method": "adakv", "budget": 0.9, "memory": 1, "chunk": 4096}
    few = keepkv.fit(LLAMA, "8k", **asked)
    gone_through: list[int] = []

    def all_of_them(starts: Iterable[int]) -> list[int]:
        gone_through.append(len(found := list(starts)))
        return found

    monkeypatch.setattr(dry, "_ends", all_of_them)
    assert keepkv.fit(LLAMA, "8k", **asked) == few and max(gone_through) > 4


def test_a_refused_model_is_told_with_its_full_cache() -> None:
    found = keepkv.fit(t.BloomConfig(n_layer=2, hidden_size=64, n_head=4, vocab_size=100), 512, memory="1GiB")
    assert found.compressed is None and "attention interface" in (found.refused or "")
    assert found.full.cache == 2 * 2 * 64 * 512 * 2 and "does not serve" in str(found)


def test_what_else_there_is_to_know() -> None:
    found = keepkv.fit(LLAMA, "16k", memory="1GiB", **ASKED)
    assert any("8,192 tokens" in note for note in found.notes)


def test_the_command_says_the_same(folder: str) -> None:
    words = ["--model", folder, "--context", "2k", "--memory", "1GiB", "-m", "streaming-llm", "--chunk", "512"]
    plain = run(*words).stdout
    assert plain.startswith("2k tokens need") and "Set this:" in plain and "max_new_tokens" in plain
    found = json.loads(run(*words, "--json").stdout)
    assert found["context"] == 2048 and found["fits"] and found["full"]["cache"] == 2 * 4 * 64 * 4 * 6 * 2048
    assert "fit" in run(*words[:-4], "-m", "streaming-llm", "--memory", "1MiB", code=1).stdout


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--context", "lots"], "is no number of tokens"),
        (["--context", "1k", "--memory", "24"], "is no amount of memory"),
        (["--context", "1k", "--memory", "24 gigs"], "is no amount of memory"),
        (["--context", "1k", "--budget", "8"], "always keeps"),
        (["--context", "1k", "--budget", "1KiB"], "always keeps"),
        (["--context", "1k", "--dtype", "int3"], "expected one of"),
        (["--context", "1k", "--codec", "int9"], "unknown codec"),
        (["--context", "1k", "--store-option", "x"], "expected key=value"),
    ],
)
def test_what_cannot_be_read_is_one_line(folder: str, words: list[str], reason: str) -> None:
    error = run("--model", folder, *words, code=2).stderr
    assert error.startswith("error: ") and error.count("\n") == 1 and reason in error


def test_a_name_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **how: Any) -> Any:
        raise OSError("We couldn't connect to the Hub")

    monkeypatch.setattr(t.AutoConfig, "from_pretrained", offline)
    assert "folder with the model's config.json" in run("--model", "a/b", "--context", "1k", code=2).stderr
    assert "no folder or file" in run("--model", "./nowhere", "--context", "1k", code=2).stderr


def test_numbers_as_people_write_them() -> None:
    assert [read_tokens(x) for x in (7, "7", "131,072", "128k", "1M", "1.5K")] == [7, 7, 131072, 131072, 2**20, 1536]
    assert [read_bytes(x) for x in (7, "24GiB", "1.5 MB")] == [7, 24 << 30, 1500000]


def test_a_prompt_that_is_kept_is_not_made_smaller(tmp_path: Path) -> None:
    zoo.model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(keepkv.KeepKVError, match=r"keeps the prompt.*prompt=False"):
        keepkv.fit(str(tmp_path), 300, method="random-attention")
    assert keepkv.fit(str(tmp_path), 300, method="random-attention", prompt=False).compressed
    with pytest.raises(keepkv.KeepKVError, match=r"When\(cap=80\) bounds the cache.*as the budget"):
        keepkv.fit(str(tmp_path), 300, method="snapkv", budget=64, when=keepkv.When(cap=80))


def by_layer(given: keepkv.Calibration) -> keepkv.Calibration:
    """``given`` for "tada", with other bits in each layer, of which the middle ones are not alike."""
    tensors = {i: {**x, "tada_bits": torch.tensor((2, 8, 4)[i % 3])} for i, x in given.tensors.items()}
    return keepkv.Calibration(given.kind, tensors, given.fingerprint, given.made_with)


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("tada", {"bits": "calibrated"}),
        ("sals", {"rank": 0.5}),
        ("sals", {"rank": 6, "value_bits": 8, "dense": (0,)}),
        ("oscar", {"bits": 4}),
    ],
)
def test_a_calibration_says_how_large_a_slot_is(codec: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The bytes of a cache that was made with it, each layer with its own; more than one layer stands for others."""
    config = zoo.model("llama").config.__class__(**{**zoo.model("llama").config.to_dict(), "num_hidden_layers": 5})
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(config).eval()
    known = calibrate(codec, model, torch.randint(3, zoo.VOCAB, (5, 2, 40)))
    known = by_layer(known) if codec == "tada" else known
    known.save(file := tmp_path / "known.safetensors")
    given: dict[str, Any] = {"method": "streaming-llm", "codec": codec, "codec_options": options}
    found = keepkv.fit(config, 400, budget=100, dtype="float32", memory=1, calibration=file, **given)
    cache = keepkv.Cache(model, budget=100, calibration=file, **given)
    with torch.no_grad():
        model(input_ids=torch.randint(3, zoo.VOCAB, (1, 400)), **{CACHE: cache})
    assert found.compressed is not None and found.compressed.cache == cache.report().bytes
    assert found.weights + found.compressed.cache < found.compressed.peak
    assert f"calibration={str(file)!r}" in found.python and f"--option calibration={file}" in found.command
    assert any("only the configuration is read" in note for note in found.notes)
    if codec == "oscar":
        config.save_pretrained(tmp_path)
        words = ["-c", "400", "-b", "100", "--dtype", "float32", "--memory", "1GiB", "--codec", codec, "--json"]
        words += ["--model", str(tmp_path), "-m", f"streaming-llm:codec.bits=4,calibration={file}"]
        assert json.loads(run(*words).stdout)["compressed"]["cache"] == found.compressed.cache


def test_a_calibration_that_does_not_fit_is_refused() -> None:
    known = calibrate("sals", zoo.model("llama"), torch.randint(3, zoo.VOCAB, (5, 2, 40)))
    with pytest.raises(keepkv.KeepKVError, match=r"made for another model.*hidden_size"):
        keepkv.fit(LLAMA, "4k", codec="sals", method="streaming-llm", calibration=known)
    with pytest.raises(keepkv.KeepKVError, match=r"'sals' was given, and no part of the method uses it"):
        keepkv.fit(zoo.model("llama").config, 400, method="streaming-llm", calibration=known)
    with pytest.raises(keepkv.KeepKVError, match=r"Oscar needs a calibration 'oscar'.*given: 'sals'"):
        keepkv.fit(zoo.model("llama").config, 400, method="streaming-llm", codec="oscar", calibration=known)
