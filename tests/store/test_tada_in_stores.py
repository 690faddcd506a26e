"""TaDA in a store and in a cache: what heads of a token share is held once, and nothing is written twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from running import batch, generate

import keepkv
from keepkv.calibrate import calibrate
from keepkv.core.slots import Slots
from keepkv.errors import CalibrationError, UnsupportedInput
from keepkv.methods.base import make_method
from keepkv.store import STORES, Held
from keepkv.store.codec.tada import Tada
from keepkv.store.zones import Zones

B, H, S, D = 2, 4, 96, 16
SMALL = {"window": 4, "sinks": 2}


def slots(seed: int = 0) -> Slots:
    keys, values = torch.randn(2, B, H, S, D, generator=torch.Generator().manual_seed(seed)).unbind(0)
    positions = torch.arange(S, dtype=torch.int32).expand(B, H, S).clone()
    return Slots(keys, values, torch.zeros(B, H, S), positions)


def store(**options: Any) -> Zones:
    made = STORES.build("dense", Held(votes=False, codec=Tada(**{"centre": True, **options})))
    assert isinstance(made, Zones)
    return made


@pytest.mark.parametrize("mean", ["16bit", "8bit"])
def test_a_store_reads_what_the_codec_wrote(mean: str) -> None:
    given, made = slots(), store(mean=mean)
    made.load(given)
    keys, values = (codec := made.held.codec).decode(codec.encode(given.keys, given.values))
    assert torch.equal(made.view().keys, keys) and torch.equal(made.view().values, values)
    content = made.slot_bytes().content
    assert content == sum(x.nbytes for x in codec.encode(given.keys[:1, :, :1], given.values[:1, :, :1]).values())


def test_no_slot_is_written_twice() -> None:
    """What stays at a second compression is what was read after the first."""
    made = store(bits=2)
    made.load(slots())
    before, keep = made.view(), torch.rand(B, 1, S, generator=torch.Generator().manual_seed(1)).expand(B, H, S) > 0.4
    after = made.successor()
    after.load_kept(before, keep)
    kept = before.select(keep)
    for name in ("keys", "values", "positions"):
        assert torch.equal(getattr(after.view(), name)[kept.valid], getattr(kept, name)[kept.valid])


def test_heads_that_hold_different_tokens_are_refused() -> None:
    made, keep = store(), torch.rand(B, H, S) > 0.5
    with pytest.raises(UnsupportedInput, match=r"heads of a token together.*int4"):
        made.load(slots().select(keep))


@pytest.mark.parametrize(("method", "store"), [("adakv", None), ("snapkv", "ragged")])
def test_layouts_of_single_heads_are_refused_before_anything_is_read(method: str, store: str | None) -> None:
    with pytest.raises(keepkv.KeepKVError, match=r"'tada' writes the KV heads of a token together.*'int4'"):
        keepkv.Cache(zoo.model("llama"), method, 64, store=store, codec="tada", codec_options={"centre": True})


@pytest.mark.parametrize("pieces", [(96,), (40, 56), (33, 1, 30, 32), (64, *[1] * 32)])
def test_codes_do_not_depend_on_how_tokens_come(pieces: tuple[int, ...]) -> None:
    """Any split into appends writes the same codes, in order; the newest stay exact."""
    given, made, start = slots(), store(), 0
    for count in pieces:
        new = slice(start, start + count)
        if count == 1:
            made.begin_decode()
        made.append(given.keys[:, :, new], given.values[:, :, new], given.positions[:, 0, new])
        if count > 1:
            made.after_prefill()
        start += count
    keys, _ = (codec := made.held.codec).decode(codec.encode(given.keys, given.values))
    coded = made.coded.length
    assert S - 2 * 32 <= coded <= S - 32 and torch.equal(made.view().positions, given.positions)
    assert torch.equal(made.view().keys, torch.cat((keys[:, :, :coded], given.keys[:, :, coded:]), 2))


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt-neox", "gpt-oss", "deepseek-v3"])
def test_a_cache_answers_nearly_as_without_codes(arch: str) -> None:
    """Padded rows, at 8 bits; heads keep the same tokens in both."""
    model = zoo.model(arch)
    options: dict[str, Any] = {"codec": "tada", "codec_options": {"bits": 8, "centre": True}}
    together = replace(make_method("snapkv", SMALL), together=True)
    caches = [keepkv.Cache(model, together, 14), keepkv.Cache(model, "snapkv", 14, **SMALL, **options)]
    exact, coded = (generate(model, batch(), cache).scores_ for cache in caches)
    assert torch.allclose(exact, coded, atol=0.1) and caches[1].report().compressed


def test_a_calibrated_cache_is_saved_copied_and_read_back(tmp_path: Path) -> None:
    model = zoo.model("llama")
    texts = list(torch.randint(3, 60, (8, 1, 24), generator=torch.Generator().manual_seed(7)))
    found = calibrate("tada", model, texts, bits=3.0, proposals=2)
    options: dict[str, Any] = {**SMALL, "codec": "tada", "codec_options": {"bits": "calibrated", "centre": True}}
    with pytest.raises(CalibrationError, match="keepkv calibrate tada"):
        keepkv.Cache(model, "snapkv", 14, **options)
    cache = keepkv.Cache(model, "snapkv", 14, calibration=found, **options)
    generate(model, batch(), cache)
    bits = [layer.store.held.codec.bits for layer in cache.compressible]  # type: ignore[attr-defined]
    assert bits == [int(x["tada_bits"]) for x in found.tensors.values()]
    cache.save(tmp_path / "a.keepkv")
    twins = cache.copy(), keepkv.Cache.load(tmp_path / "a.keepkv", model, calibration=found)
    for twin in twins:
        for one, two in zip(cache.compressible, twin.compressible, strict=True):
            assert torch.equal(one.store.view().keys, two.store.view().keys)
