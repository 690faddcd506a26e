"""Caches as files: everything follows, nothing foreign or damaged gets in."""

from __future__ import annotations

import copy
import dataclasses
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from running import batch, generate, row
from safetensors.torch import load_file, save_file

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.errors import CacheFileError, CacheStateError
from keepkv.methods import METHODS, make_method
from keepkv.methods.own.keepkv import keepkv as keepkv_method
from keepkv.score.content.knorm import KNorm

SMALL = {"window": 4, "sinks": 2}


def made(arch: str, method: str = "keepkv", **options: Any) -> keepkv.Cache:
    cache = keepkv.Cache(zoo.model(arch), method, 14, **{**SMALL, **options})
    generate(zoo.model(arch), batch(), cache)
    return cache


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gemma4", "gpt-oss", "deepseek-v3"])
@pytest.mark.parametrize("store", ["dense", "ragged", "int8"])
@pytest.mark.parametrize("every", [None, 3])
def test_round_trip(tmp_path: Path, arch: str, store: str, every: int | None) -> None:
    """A loaded cache continues as the saved one does, further compressions included."""
    method = "snapkv" if arch == "deepseek-v3" else "keepkv"
    cache = made(arch, method, store=store, when=keepkv.When(every=every)) if every is None else keepkv.Cache(
        zoo.model(arch), method, 14, store=store, when=keepkv.When(every=every), **SMALL
    )  # fmt: skip
    if every is not None:
        generate(zoo.model(arch), batch(), cache)
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    loaded = keepkv.Cache.load(path, zoo.model(arch))
    weight = {"bytes", "full_bytes", "ratio"}  # transformers' sliding layers hold a slice of something larger
    receipts = [c.report().to_dict() for c in (loaded, cache)]
    assert {k: v for k, v in receipts[0].items() if k not in weight} == {
        k: v for k, v in receipts[1].items() if k not in weight
    }
    assert receipts[0]["bytes"] <= receipts[1]["bytes"]
    feed = torch.randint(3, zoo.VOCAB, (3, 1))
    mask = torch.cat((batch()["attention_mask"], torch.ones(3, 5, dtype=torch.long)), dim=1)
    with torch.no_grad():
        for _ in range(5):
            mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), dim=1)
            outs = [zoo.model(arch)(input_ids=feed, attention_mask=mask, **{CACHE: c}).logits for c in (cache, loaded)]
            assert torch.equal(*outs)


def test_truncated_altered_and_foreign_files_are_refused(tmp_path: Path) -> None:
    model, path = zoo.model("llama"), tmp_path / "cache.safetensors"
    made("llama").save(path)
    good = path.read_bytes()
    damaged = {
        "truncated": good[: len(good) // 2],
        "no header": good[:4],
        "altered": good[:-100] + bytes([good[-100] ^ 1]) + good[-99:],
        "empty": b"",
        "not safetensors": b"PK\x03\x04" + b"pickle" * 100,
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CacheFileError, match=r"truncated|checksum"):
            keepkv.Cache.load(tmp_path / name, model)
    save_file({"x": torch.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(CacheFileError, match="not a cache written by keepkv"):
        keepkv.Cache.load(tmp_path / "foreign", model)
    with pytest.raises(CacheFileError, match="no such file"):
        keepkv.Cache.load(tmp_path / "absent", model)
    with pytest.raises(CacheFileError, match=r"another model.*model_type"):
        keepkv.Cache.load(path, zoo.model("qwen3"))


def test_unnamed_methods_must_be_given_again(tmp_path: Path) -> None:
    model, path, method = zoo.model("llama"), tmp_path / "c", keepkv.Method(score=KNorm())
    cache = keepkv.Cache(model, method, 14)
    generate(model, row(batch(), 0), cache)
    cache.save(path)
    with pytest.raises(CacheFileError, match="method="):
        keepkv.Cache.load(path, model)
    assert keepkv.Cache.load(path, model, method).report() == cache.report()


def test_a_name_that_tells_of_other_pieces_is_not_written(tmp_path: Path) -> None:
    model = zoo.model("llama")
    method = dataclasses.replace(make_method("snapkv", {}), score=KNorm())
    cache = keepkv.Cache(model, method, 40)
    generate(model, row(batch(), 0), cache)
    with pytest.raises(keepkv.KeepKVError, match="has the name 'snapkv' and other pieces"):
        cache.save(tmp_path / "c")


def test_a_method_that_its_factory_made_is_loaded_with_all_its_options(tmp_path: Path) -> None:
    """Not with the defaults of what a cache's own keywords did not name."""
    model, path, when = zoo.model("llama"), tmp_path / "c", keepkv.When(every=3)
    by_call = keepkv_method(key="zip", sinks=1, window=5, when=when)
    for method in (by_call, METHODS.build("random", sinks=0, window=3, when=when), METHODS.build("g-kv", window=6)):
        cache = keepkv.Cache(model, method, 14)
        generate(model, row(batch(), 0), cache)
        cache.save(path)
        loaded = keepkv.Cache.load(path, model)
        assert loaded.settings.method == method and loaded.settings.method.options == method.options
        assert loaded.report() == cache.report()


def test_a_method_with_one_field_replaced_is_loaded_as_it_was(tmp_path: Path) -> None:
    model, path = zoo.model("llama"), tmp_path / "c"
    method = replace(METHODS.build("snapkv", window=4), when=keepkv.When(every=3), sinks=1)
    cache = keepkv.Cache(model, method, 14)
    generate(model, row(batch(), 0), cache)
    cache.save(path)
    assert keepkv.Cache.load(path, model).settings.method == method


def test_options_that_are_objects_cannot_be_saved(tmp_path: Path) -> None:
    cache = keepkv.Cache(zoo.model("llama"), "adakv", 14, score=KNorm(), **SMALL)
    with pytest.raises(CacheStateError, match="cannot be written"):
        cache.save(tmp_path / "c")


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        vocab_size=zoo.VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    model = Qwen3NextForCausalLM(config).eval()
    cache = keepkv.Cache(model, "random", 14)
    generate(model, row(batch(), 0), cache)
    with pytest.raises(keepkv.KeepKVError, match="cannot be saved"):
        cache.save(tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.filterwarnings("ignore:.*earlier keepkv")
@pytest.mark.parametrize("name", ["dense", "flat", "int8", "every", "spans"])
def test_files_of_the_first_layout_still_load(name: str) -> None:
    """Written when a store was one name and layers counted decoded tokens; logits of the four tokens that followed, two
    compressions among them where it compresses while decoding, were kept beside."""
    folder = Path(__file__).parents[1] / "data" / "caches"
    model, expected = zoo.model("llama"), load_file(folder / "logits.safetensors")[name]
    cache = keepkv.Cache.load(folder / f"{name}.safetensors", model)
    feed = torch.tensor([[5], [6], [7]])
    mask = torch.cat((batch()["attention_mask"], torch.ones(3, 2, dtype=torch.long)), dim=1)
    for i in range(4):
        mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), dim=1)
        with torch.no_grad():
            logits = model(input_ids=feed + i, attention_mask=mask, **{CACHE: cache}).logits[:, -1]
        assert torch.allclose(logits, expected[i], atol=1e-4), float((logits - expected[i]).abs().max())


def test_files_of_the_first_layout_say_that_weights_were_not_compared() -> None:
    path = Path(__file__).parents[1] / "data" / "caches" / "dense.safetensors"
    with pytest.warns(UserWarning, match="not compared with the model: settings and weights: .* earlier keepkv"):
        keepkv.Cache.load(path, zoo.model("llama"))


@pytest.mark.parametrize("store", ["dense", "ragged", "static", "int8"])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gemma4", "deepseek-v3"])
def test_a_cache_that_has_read_nothing_is_saved_and_goes_on(tmp_path: Path, store: str, arch: str) -> None:
    """Of a static store it could not be loaded, nor saved beside layers with a sliding window."""
    model, options = (
        zoo.model(arch),
        {"store": store, **({"store_options": {"capacity": 90}} if store == "static" else {})},
    )
    cache, path = keepkv.Cache(model, "snapkv", 14, **options, **SMALL), tmp_path / "c"
    cache.save(path)
    loaded = keepkv.Cache.load(path, model)
    prompt = torch.randint(3, zoo.VOCAB, (1, 30))
    with torch.no_grad():
        assert torch.equal(*(model(prompt, **{CACHE: c}).logits for c in (cache, loaded)))
    assert loaded.report() == replace(cache.report(), seconds=loaded.report().seconds)


def test_a_cache_that_can_be_rolled_back_is_saved_as_that(tmp_path: Path) -> None:
    """Layers with a sliding window keep their flag; without it the next forward raised an error of torch."""
    model, path = zoo.model("gemma3"), tmp_path / "c"
    cache = keepkv.Cache(model, "snapkv", 40, **SMALL)
    for layer in cache.layers:
        layer.activate_past_recording()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randint(3, zoo.VOCAB, (1, 20)), **{CACHE: cache})
        cache.save(path)
        loaded = keepkv.Cache.load(path, model)
        for twin in (cache, loaded):
            twin.crop(-5)
        assert torch.equal(*(model(torch.tensor([[7]]), **{CACHE: c}).logits for c in (cache, loaded)))


@pytest.mark.skipif(os.name != "posix", reason="kinds of files of POSIX")
def test_what_is_no_file_is_said_to_be_none(tmp_path: Path) -> None:
    """By save and load alike, as errors of the cache; what stood there stands."""
    model, cache = zoo.model("llama"), keepkv.Cache(zoo.model("llama"), "full")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"")
    said = {
        "folder": "it is a directory", "pipe": "it is a named pipe", "/dev/null": "it is a device",
        "x" * 300: "File name too long", "file/x": "Not a directory", "a\0b": "null",
    }  # fmt: skip
    for name, reason in said.items():
        with pytest.raises(CacheFileError, match=reason):
            cache.save(tmp_path / name)
        with pytest.raises(CacheFileError, match=reason):
            keepkv.Cache.load(tmp_path / name, model)
    with pytest.raises(CacheFileError, match="no such file or folder"):
        cache.save(tmp_path / "nowhere" / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "pipe"]


def test_permission_denied_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = keepkv.Cache(zoo.model("llama"), "full")
    cache.save(tmp_path / "c")

    def denied(*_: Any, **__: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("keepkv.core.wholefile.os.open", denied)
    with pytest.raises(CacheFileError, match=r"cannot write .*: Permission denied"):
        cache.save(tmp_path / "c")
    with pytest.raises(CacheFileError, match=r"cannot read .*: Permission denied"):
        keepkv.Cache.load(tmp_path / "c", zoo.model("llama"))


def test_large_files_and_signatures(tmp_path: Path) -> None:
    model, path = zoo.model("llama"), tmp_path / "c"
    cache = made("llama")
    cache.save(path)
    with pytest.raises(CacheFileError, match="more than max_bytes=1000"):
        keepkv.Cache.load(path, model, max_bytes=1000)
    with pytest.raises(CacheFileError, match="has no signature"):
        keepkv.Cache.load(path, model, key=b"mine")
    cache.save(path, key=b"mine")
    for options in ({}, {"key": b"mine"}):
        assert keepkv.Cache.load(path, model, **options).report() == cache.report()
    with pytest.raises(CacheFileError, match="not made with this key"):
        keepkv.Cache.load(path, model, key=b"yours")


def test_a_cache_that_holds_no_numbers_is_not_saved(tmp_path: Path) -> None:
    cache = made("llama")
    next(iter(cache.compressible[1].store.parts())).keys[:] = float("nan")
    with pytest.raises(CacheStateError, match=r"1\.store\.keys' has numbers that are not finite"):
        cache.save(tmp_path / "c")


def test_a_refused_file_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model, path = copy.deepcopy(zoo.model("llama")), tmp_path / "c"
    made("llama", "snapkv", kernel=3).save(path)
    model.set_attn_implementation("sdpa")
    next(model.model.parameters()).data.add_(1)
    with pytest.raises(CacheFileError, match="weights"):
        keepkv.Cache.load(path, model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("options", [{}, {"codec": "int8"}, {"store": "ragged", "codec": "int8"}], ids=str)
def test_a_cache_is_saved_right_after_a_compression_and_after_rows_left(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Without the guards: a codec's slots are not saved, and a file that was written is refused."""
    model, file = zoo.model("llama"), tmp_path / "cache"
    long, short = (keepkv.Cache(model, "snapkv", 14, window=4, sinks=2, **options) for _ in range(2))
    with torch.no_grad():
        for cache, tokens in ((long, 40), (short, 6)):
            model(**batch((tokens,)), **{CACHE: cache})
            cache.save(file)
            keepkv.Cache.load(file, model)
        long.join(short)
        for cache in (long.split([1]), long):
            cache.save(file)
            loaded = keepkv.Cache.load(file, model)
            logits = [model(torch.tensor([[5]]), **{CACHE: one}).logits for one in (cache, loaded)]
            assert torch.equal(*logits)


def test_a_loaded_cache_knows_what_was_decoded(tmp_path: Path) -> None:
    """Without the guard: a token taken back after a load still counts, and the next compression comes early."""
    model, found = zoo.model("llama"), []
    for saved in (False, True):
        cache = keepkv.Cache(model, "knorm", 9, when=keepkv.When(every=3), window=4, sinks=2)
        cache.activate_past_recording()
        logits = []
        with torch.no_grad():
            model(**batch((12,)), **{CACHE: cache})
            model(torch.tensor([[5, 6]]), **{CACHE: cache})
            if saved:
                cache.save(tmp_path / "cache")
                cache = keepkv.Cache.load(tmp_path / "cache", model)
            cache.crop(-2)
            for token in range(5, 11):
                logits.append(model(torch.tensor([[token]]), **{CACHE: cache}).logits)
        found.append((torch.stack(logits), cache.report().kept))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
