"""Caches as files: everything follows, nothing foreign or damaged gets in."""

from __future__ import annotations

import dataclasses
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
from keepkv.methods.keepkv import keepkv as keepkv_method
from keepkv.score.knorm import KNorm

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
