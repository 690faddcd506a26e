"""The codec SALS, its calibration, and the selections that go with low rank."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import running
import torch
import zoo
from torch import Tensor

import keepkv
from keepkv.calibrate import calibrate
from keepkv.core.calibration import Calibration
from keepkv.core.layer_info import LayerInfo
from keepkv.engine.versions import CACHE
from keepkv.kernels.codes import Codes
from keepkv.select import Asked
from keepkv.store import CODECS
from keepkv.store.canary import SWITCH
from keepkv.store.codec.sals import DenseLayer, Sals
from keepkv.store.older import Older

LENGTHS = (120, 90)


@cache
def calibration(kind: str = "sals", arch: str = "llama", **options: Any) -> Calibration:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, zoo.VOCAB, (1, 96), generator=generator) for _ in range(8)]
    return calibrate(kind, zoo.model(arch), texts, **options)


@cache
def width(arch: str = "llama") -> int:
    return int(calibration("sals", arch).tensors[0]["sals_mean"].numel())


def made(select: str | None = None, method: str = "full", budget: Any = None, arch: str = "llama", **codec: Any) -> Any:
    own = {key: codec.pop(key) for key in ("weighted",) if key in codec}
    known = [calibration("sals", arch, **own)] + ([calibration("loki", arch)] if select == "loki" else [])
    more = {} if select is None else {"selected": codec.pop("selected", 0.25)}
    more |= {} if select is None else {"select_options": {"sinks": 2, "window": 4, "measure": 1}}
    return keepkv.Cache(
        zoo.model(arch), method, budget, codec="sals", codec_options=codec, calibration=known, select=select, **more
    )


def logits(cache: Any, arch: str = "llama", **options: Any) -> Tensor:
    found: Tensor = running.generate(zoo.model(arch), running.batch(LENGTHS), cache, **options).scores_
    return found


def inside(made: keepkv.Cache) -> Any:
    """The store of the first layer, also where a canary watches it."""
    store = made.compressible[0].store
    return getattr(store, "inner", store)


def fitted(**options: Any) -> Sals:
    codec = CODECS.build("sals", **options).for_layer(LayerInfo(), calibration().tensors[0])
    assert isinstance(codec, Sals)
    return codec


# --- the formula ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_keys_are_the_formula_in_float64(weighted: bool) -> None:
    known = calibration("sals", weighted=weighted).tensors[0]
    codec = CODECS.build("sals", rank=6, ranked=2, value_bits=16).for_layer(LayerInfo(), known)
    h, d = known["sals_mean"].shape
    keys, values = torch.randn(2, h, 5, d), torch.randn(2, h, 5, d)
    fields = codec.encode(keys, values)
    read, same = codec.decode(fields)
    assert torch.equal(same, values) and fields["keys"].shape == (2, 1, 5, 2) and fields["rest"].shape == (2, 1, 5, 4)
    back = known["sals_basis"][:, :6].double()
    into = known.get("sals_into", known["sals_basis"])[:, :6].double()
    for b in range(2):
        for s in range(5):
            x = keys[b, :, s].double().flatten() - known["sals_mean"].double().flatten()
            want = (back @ (into.mT @ x) + known["sals_mean"].double().flatten()).view(h, d)
            assert torch.allclose(read[b, :, s].double(), want, atol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_full_rank_is_dense_attention(weighted: bool) -> None:
    """r = r* = d, every slot selected, values as they are."""
    whole = logits(keepkv.Cache(zoo.model("llama"), "full"))
    for select in (None, "codes", "latent", "exact"):
        more = {"selected": 1.0} if select else {}
        found = made(select, rank=1.0, ranked=1.0, value_bits=16, weighted=weighted, **more)
        assert (logits(found) - whole).abs().max() < 1e-4, select


def test_latent_scores_are_those_of_keys_up_to_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    """With r* = d: the sum over heads of the mean query of a group with the key, both before RoPE."""
    from keepkv.select.low_rank import Latent

    scores, seen = Latent.scores, []

    def watched(self: Latent, asked: Asked) -> Tensor:
        found = scores(self, asked)
        rope, slots = asked.layer.rope, asked.slots
        assert rope is not None
        query = rope.unrotate(asked.query[:, :, None].double(), asked.seen[:, None, None] - 1)[:, :, 0]
        keys = torch.cat([x for x in slots.keys() if isinstance(x, Tensor)], 2).double()
        keys = rope.unrotate(keys, slots.positions.clamp_min(0))
        mean = query.view(*keys.shape[:2], -1, keys.shape[-1]).mean(2)
        want = torch.einsum("bhd,bhsd->bs", mean, keys)
        for row in range(len(want)):
            there = slots.positions[row, 0] >= 0
            off = (found[row, 0].double() - want[row])[there]
            assert float(off.max() - off.min()) < 1e-3
            seen.append(row)
        return found

    monkeypatch.setattr(Latent, "scores", watched)
    logits(made("latent", rank=1.0, ranked=1.0, value_bits=16))
    assert seen


def test_energy_does_not_fall_with_rank() -> None:
    """And no basis of single heads has more than the joint one, of the same rank in all."""
    keys = torch.randn(1, 2, 400, 8, dtype=torch.float64)
    keys[:, 1] = keys[:, 0] @ torch.randn(8, 8, dtype=torch.float64) + 0.1 * keys[:, 1]
    joint = keys.transpose(1, 2).flatten(2)[0]
    joint = joint - joint.mean(0)

    def energies(x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x.mT @ x).flip(-1)

    found = energies(joint).cumsum(0)
    assert bool((found.diff() >= 0).all())
    apart = (energies(joint[:, :8]) + energies(joint[:, 8:])).cumsum(0)
    assert bool((found[1::2] >= apart - 1e-6).all())
    for row in calibration().made_with["found"]["layers"]:
        quarter, eighth = row["fitted"]
        assert 0 < eighth <= quarter <= 1 and len(row["held_out"]) == 2 and 0 < row["recall"][1] <= 1


def test_more_rank_and_more_coordinates_keep_more() -> None:
    errors, whole = [], logits(keepkv.Cache(zoo.model("llama"), "full"), new=3)
    for rank in (2, width() // 4, width()):
        errors.append(float((logits(made(rank=rank, value_bits=16), new=3) - whole)[:, 1:].square().mean()))
    assert errors == sorted(errors, reverse=True)


# --- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "bits"), [(0.25, 4), (0.125, 2), (8, 16)])
def test_bytes_are_the_formula(rank: Any, bits: int) -> None:
    """r·16 bits of keys, bits + 32/group of a value, in a model of 16 bits; of what is allocated."""
    codec, (h, d) = fitted(rank=rank, value_bits=bits), calibration().tensors[0]["sals_mean"].shape
    r = rank if isinstance(rank, int) else round(h * d * rank)
    want = 2 * r + h * d * (2 if bits == 16 else (bits + 32 / 32) / 8)
    assert codec.token_bytes(h, d, d, torch.bfloat16) == pytest.approx(want, rel=0.01)
    fields = codec.encode(torch.randn(1, h, 7, d), torch.randn(1, h, 7, d).bfloat16())
    assert sum(x.numel() * x.element_size() for x in fields.values()) == pytest.approx(7 * want, rel=0.01)


def test_dense_layers_are_as_without_a_codec_and_count() -> None:
    model = zoo.model("llama")
    layers = model.config.num_hidden_layers
    some, none, whole = made("codes", dense=(0, -1)), made("codes"), keepkv.Cache(model, "full")
    for one in (some, none, whole):
        logits(one)
    first, last = some.compressible[0], some.compressible[-1]
    assert all(isinstance(x.store.held.codec, DenseLayer) and not x.tally.selections for x in (first, last))
    assert torch.equal(first.store.view().keys[:, :, :100], whole.compressible[0].store.view().keys[:, :, :100])
    assert none.report().ratio < some.report().ratio or layers == 2
    everything = made("codes", dense=tuple(range(layers)))
    assert torch.equal(logits(everything), logits(keepkv.Cache(model, "full")))


def test_the_receipt_counts_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents, codes, the exact window, positions, and layers that are dense."""
    monkeypatch.delenv(SWITCH, raising=False)  # a canary's hashes are bytes too
    model, tokens = zoo.model("llama"), 400
    cache = made(rank=0.25, dense=(0,))
    running.generate(model, running.batch((tokens,)), cache, new=1)
    (h, d), layers = calibration().tensors[0]["sals_mean"].shape, len(cache.compressible)
    content, plain, window = h * d + h * d * (4 + 1) / 8, 2 * h * d * 4, 32  # d/4 numbers of 4 bytes
    coded = (tokens - window) * content + window * plain
    want = tokens * plain + (layers - 1) * coded + layers * tokens * h * 4
    report = cache.report()
    assert report.bytes == pytest.approx(want, rel=0.01)
    assert report.ratio == pytest.approx(want / (layers * tokens * plain), rel=0.01)


@pytest.mark.parametrize("select", ["latent", "codes", "quest"])
def test_places_come_from_positions_and_not_from_the_order_of_slots(
    select: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SWITCH, raising=False)  # a canary would see that they moved
    ids = running.batch((100,))["input_ids"]
    found = []
    for shuffled in (False, True):
        cache = made(select)
        with torch.no_grad():
            zoo.model("llama")(ids, **{CACHE: cache})
            for layer in cache.compressible if shuffled else ():
                coded = getattr(layer.store, "inner", layer.store).coded
                order = torch.randperm(coded.length)
                coded.set({name: x[:, :, order] for name, x in coded.used().items()})
            found.append(zoo.model("llama")(ids[:, :1], **{CACHE: cache}).logits)
    assert torch.allclose(*found, atol=1e-5)


# --- what a cache does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", [None, "latent", "codes", "quest", "landmarks", "loki"])
@pytest.mark.parametrize(("method", "budget"), [("full", None), ("snapkv", 0.7), ("keepkv", 0.7)])
def test_rows_are_as_if_alone(select: str | None, method: str, budget: Any) -> None:
    inputs, both = running.batch(LENGTHS), logits(made(select, method, budget))
    for i in range(len(LENGTHS)):
        alone = running.generate(zoo.model("llama"), running.row(inputs, i), made(select, method, budget)).scores_
        assert torch.allclose(alone[0], both[i], atol=1e-4), i


def test_in_one_piece_or_token_by_token() -> None:
    """The same codes, whatever the pieces in which a prompt comes."""
    ids, found = running.batch((80,))["input_ids"], []
    for step in (80, 1):
        cache = made()
        with torch.no_grad(), cache.reading():
            for start in range(0, 80, step):
                zoo.model("llama")(ids[:, start : start + step], **{CACHE: cache})
        found.append(inside(cache))
    for name in ("values", "keys", "rest"):
        one, other = (x.coded.used()[name][:, :, :16] for x in found)
        assert torch.allclose(one.float(), other.float(), atol=1e-5 if name != "values" else 0), name


@pytest.mark.parametrize("method", ["full", "snapkv"])
def test_saved_copied_cropped(method: str, tmp_path: Path) -> None:
    cache = made("codes", method, None if method == "full" else 0.7)
    logits(cache)
    cache.save(tmp_path / "x.safetensors")
    loaded = keepkv.Cache.load(tmp_path / "x.safetensors", zoo.model("llama"), calibration=calibration())
    twin, other = cache.copy(), torch.full((2, 1), 7)

    def step(which: Any) -> Tensor:
        mask = which.attention_mask(1)
        with torch.no_grad():
            return zoo.model("llama")(other, attention_mask=mask, **{CACHE: which}).logits  # type: ignore[no-any-return]

    first = step(cache)
    assert torch.equal(first, step(loaded)) and torch.equal(first, step(twin))
    second = step(cache)
    cache.crop(-1)
    assert torch.equal(second, step(cache))


def test_slots_that_stay_are_written_once() -> None:
    cache = made(None, "keydiff", 0.9)
    logits(cache, new=2)
    before = cache.copy()
    after = cache.copy(budget=0.5)
    after.compress()
    old, new = inside(before), inside(after)
    where = {int(p): i for i, p in enumerate(old.coded.used()["positions"][0, 0]) if p >= 0}
    moved = 0
    for i, p in enumerate(new.coded.used()["positions"][0, 0].tolist()):
        if p in where:
            moved += 1
            for name in ("keys", "rest", "values"):
                assert torch.equal(new.coded.used()[name][0, 0, i], old.coded.used()[name][0, 0, where[p]])
    assert moved > 20


@pytest.mark.parametrize("arch", ["gpt-oss", "gemma4", "qwen3"])
def test_other_architectures(arch: str) -> None:
    whole = logits(keepkv.Cache(zoo.model(arch), "full"), arch)
    found = logits(made("codes", arch=arch, rank=1.0, ranked=1.0, value_bits=16, selected=1.0), arch)
    assert (found - whole).abs().max() < 2e-4


# --- selections ----------------------------------------------------------------------------------------------------


def test_codes_look_at_the_leading_coordinates_with_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    keys = Older.keys

    def watched(self: Older, glance: bool = False) -> Any:
        for x in keys(self, glance):
            seen.append(glance)
            yield x

    monkeypatch.setattr(Older, "keys", watched)
    cache = made("codes")
    logits(cache)
    assert True in seen
    codec = fitted()
    h, d = codec.mean.shape
    fields = codec.encode(torch.randn(1, h, 3, d), torch.randn(1, h, 3, d))
    few = codec.glance({"keys": fields["keys"]}, {})
    rest = codec.decode({**fields, "rest": torch.zeros_like(fields["rest"])})[0]
    assert not isinstance(few, Codes) and torch.allclose(few, rest, atol=1e-6)


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 10_000}, "rank up to"),
        ({"rank": 0}, "rank"),
        ({"rank": 1.5}, "rank"),
        ({"rank": 4, "ranked": 8}, "give fewer"),
        ({"value_bits": 3}, "2, 4, 8 or 16"),
        ({"method": "adakv", "budget": 0.5}, "int4"),
        ({"dense": ("a",)}, "whole numbers"),
        ({"dense": (40,)}, "no layer"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(keepkv.KeepKVError, match=said):
        made(**options)


def test_a_rank_beyond_the_calibration_is_refused() -> None:
    few = calibration("sals", rank=4)
    with pytest.raises(keepkv.KeepKVError, match="calibrate with rank="):
        keepkv.Cache(zoo.model("llama"), "full", codec="sals", calibration=few)
    cache = keepkv.Cache(zoo.model("llama"), "full", codec="sals", codec_options={"rank": 4}, calibration=few)
    assert logits(cache).isfinite().all()


def test_calibrations_that_do_not_fit_are_refused() -> None:
    model, own = zoo.model("llama"), calibration()
    with pytest.raises(keepkv.KeepKVError, match="keepkv calibrate sals"):
        keepkv.Cache(model, "full", codec="sals")
    with pytest.raises(keepkv.KeepKVError, match="another model"):
        keepkv.Cache(zoo.model("qwen3"), "full", codec="sals", calibration=own)
    bad = [
        {i: {"sals_mean": x["sals_mean"]} for i, x in own.tensors.items()},
        {i: {**x, "sals_basis": x["sals_basis"][1:]} for i, x in own.tensors.items()},
        {i: {**x, "sals_mean": x["sals_mean"].flatten()} for i, x in own.tensors.items()},
    ]
    for tensors in bad:
        with pytest.raises(keepkv.KeepKVError, match="sals_basis"):
            keepkv.Cache(model, "full", codec="sals", calibration=Calibration("sals", tensors, own.fingerprint, {}))
    with pytest.raises(keepkv.KeepKVError, match="sals"):
        keepkv.Cache(model, "full", codec="int4", select="latent")
    with pytest.raises(keepkv.KeepKVError, match="longer texts"):
        calibrate("sals", model, [torch.ones(1, 3, dtype=torch.int64)])
    with pytest.raises(keepkv.KeepKVError, match="latents"):
        calibrate("sals", zoo.model("deepseek-v3"), [torch.ones(1, 30, dtype=torch.int64)])
