"""``keepkv bench``: what is counted, what is compared, what a row says. No test depends on how long anything takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from bench_shape import GEOMETRY, SHAPE, TEXT, TOKEN
from transformers import LlamaConfig, MixtralConfig, QuantizedCache

from keepkv.bench import hardware, roofline, worker
from keepkv.bench.plan import Sweep, at, blocks, by_budget, points, total
from keepkv.bench.protocol import WARM, Measurement
from keepkv.bench.shapes import Shape, hardly_anything
from keepkv.bench.sizes import Geometry, grown, largest_batch, read_cap, row_bytes
from keepkv.bench.systems import PLAIN, System, peers, slots_asked
from keepkv.core.when import When
from keepkv.errors import KeepKVError
from keepkv.measure import Percentiles
from keepkv.measure.content import content
from keepkv.store.ragged import SEGMENT, SHARED

CONTEXT, NEW = 60, 3


def knows_fp8() -> bool:
    """The oldest transformers that is supported does not."""
    try:
        return bool(QuantizedCache("fp8", SHAPE.config()))
    except ValueError:
        return False


needs_fp8 = pytest.mark.skipif(not knows_fp8(), reason="this transformers has no fp8 cache")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    SHAPE.save(folder, torch.float32)
    return str(folder)


def measured(tiny: str, one: System, **more: Any) -> Measurement:
    """What a child process would measure, in this one."""
    spec = {"model": tiny, "device": "cpu", "dtype": "float32", "threads": 1, "context": CONTEXT, "batch": 2}
    spec |= {"new": NEW, "chunk": None, "seed": 0, "vocab": 64}
    return worker.build(spec | one.spec() | more)[0]


def turns(tiny: str, one: System, **more: Any) -> list[dict[str, Any]]:
    """A turn that reads the prompt and one that does not."""
    mine = measured(tiny, one, **more)
    return [mine.turn(True), mine.turn(False)]


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_shape_reads_what_it_writes() -> None:
    assert str(SHAPE) == TEXT and Shape.read(str(SHAPE)) == SHAPE
    plain = Shape.read("layers=1,hidden=96,heads=3")
    assert (plain.kv_heads, plain.head_dim, plain.intermediate, plain.vocab) == (3, 32, 256, 32000)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layers=2,hidden=8", "lacks heads"),
        ("layers=2,hidden=8,haeds=2", "Did you mean 'heads'"),
        ("layers=two,hidden=8,heads=2", "layers=NUMBER"),
        ("layers=2,hidden=8,heads=3,kv_heads=2", "multiple of kv_heads"),
        ("layers=2,hidden=6,heads=2", "even"),
    ],
)
def test_shape_says_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(KeepKVError, match=words):
        Shape.read(text)


# --- the floor -------------------------------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    """Llama: q, k, v, o, three matrices of the MLP, two norms; final norm, output; of the embedding one row a token."""
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert roofline.weight_bytes(SHAPE.config(), torch.float32, 5) == 4 * (2 * layer + 32 + 64 * 32 + 5 * 32)
    tied = SHAPE.config()
    tied.tie_word_embeddings = True
    assert roofline.weight_bytes(tied, torch.bfloat16, 5) == 2 * (2 * layer + 32 + 64 * 32)


def test_of_experts_only_those_that_one_token_uses() -> None:
    sizes_of = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config: dict[str, Any] = {**sizes_of, "num_hidden_layers": 1, "vocab_size": 32, "tie_word_embeddings": False}
    one, two = (MixtralConfig(**config, num_local_experts=4, num_experts_per_tok=used) for used in (1, 2))
    count = [roofline.weight_bytes(config, torch.float32, 1) for config in (one, two)]
    assert count[1] - count[0] == 4 * 3 * 16 * 24


def test_floor_is_bytes_over_bandwidth() -> None:
    assert roofline.seconds(600, 300, 100, 500.0) == 2.0


@pytest.mark.parametrize("store", [None, "flat", "int8", "static"])
@pytest.mark.parametrize("method", ["snapkv", "keepkv"])
def test_content_is_what_the_receipt_counts(tiny: str, store: str | None, method: str) -> None:
    """Slots × (D + Dv) × bytes, and 4 bytes of votes each; 1 byte and two scales where they are packed."""
    options: dict[str, Any] = {"window": 8} | ({"threshold": None} if method == "keepkv" else {})
    one = System("keepkv", method, 40, options, store=store)
    runner = measured(tiny, one).runner
    cache = runner.start()
    with torch.no_grad():
        runner.read(cache, torch.randint(64, (2, CONTEXT)))
    kept = sum(n for layer in cache.report().kept.values() for row in layer for n in row)
    assert kept == 2 * 2 * 2 * 40  # layers, rows, heads
    slots, votes = content(cache)
    assert slots == kept * (16 + 2 * 4 if store == "int8" else 16 * 4)
    assert votes == (4 * kept if method == "keepkv" else 0)


def test_content_of_a_plain_cache(tiny: str) -> None:
    first, again = turns(tiny, PLAIN)
    middle = CONTEXT + WARM + NEW / 2  # mean of before and after what was timed
    assert first["slot_bytes"] == 2 * TOKEN * middle == again["slot_bytes"]  # taken back, then decoded again
    assert first["bytes"] == 2 * TOKEN * (CONTEXT + WARM + NEW) and first["vote_bytes"] == 0
    assert "prefill" in first and "prefill" not in again


# --- turns -----------------------------------------------------------------------------------------------------------


def test_decoding_starts_from_the_end_of_the_prompt_each_time(tiny: str) -> None:
    one = System("keepkv", "snapkv", 30, {"window": 8})
    first, again = turns(tiny, one)
    assert first["slots"] == again["slots"] == 30 + WARM + NEW
    assert first["compressed"] and first["compressions"] == 2  # one a layer
    assert first["compression"] > 0 and first["prefill"] > first["compression"]


def test_a_cache_that_compresses_while_decoding_stays_at_its_bound(tiny: str) -> None:
    one = System("keepkv", "streaming-llm", 20, {"when": When(every=2)})
    found = turns(tiny, one)
    assert all(20 <= turn["slots"] <= 22 for turn in found)


def test_chunks_end_with_the_same_tokens(tiny: str) -> None:
    whole, parts = (turns(tiny, PLAIN, chunk=chunk)[0] for chunk in (None, 16))
    assert whole["bytes"] == parts["bytes"]


@needs_fp8
def test_quantised_caches_weigh_less(tiny: str) -> None:
    packed, plain = turns(tiny, System("transformers", "fp8"))[0], turns(tiny, PLAIN)[0]
    assert packed["bytes"] < 0.3 * plain["bytes"]


def test_a_quantised_cache_that_transformers_lacks_is_named(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worker.QUANTISED, "fp8", ("fp1", None))
    with pytest.raises(KeepKVError, match="no quantised cache 'fp1'"):
        turns(tiny, System("transformers", "fp8"))


# --- sizes and caps --------------------------------------------------------------------------------------------------


def test_geometry() -> None:
    assert GEOMETRY.token == TOKEN
    with pytest.raises(KeepKVError, match="--batch instead of --cap"):
        Geometry.of(LlamaConfig(layer_types=["sliding_attention"] * 32), torch.float32)


@pytest.mark.parametrize(
    "one",
    [
        PLAIN,
        System("keepkv", "full"),
        System("keepkv", "snapkv", 0.5, {"window": 8}),
        System("keepkv", "adakv", 0.5, {"window": 8}),
        System("keepkv", "keepkv", 40, {"window": 8, "threshold": None}),
        System("keepkv", "snapkv", 50, {"window": 8}, store="int8"),
        System("keepkv", "snapkv", 50, {"window": 8, "codec": "int4", "codec_options": {"value_bits": 2}}),
        System("keepkv", "snapkv", 50, {"window": 8, "codec": "lloyd-max", "codec_options": {"bits": 2}}),
        System("keepkv", "snapkv", 50, {"window": 8, "codec": "kivi"}),
        System("keepkv", "snapkv", 40, {"window": 8}, store="static", store_options={"capacity": 64}),
        pytest.param(System("transformers", "fp8"), marks=needs_fp8),
    ],
    ids=lambda one: one.label + (f":{one.store}" if one.store else ""),
)
def test_bytes_of_a_row_before_it_exists(tiny: str, one: System) -> None:
    """Never less than what is then really allocated, and not much more: tiles of ragged heads, which plain torch makes
    for decoding and no kernel does, are counted at their most."""
    expected = 2 * row_bytes(GEOMETRY, one, CONTEXT, WARM + NEW)
    counts = 512  # bookkeeping of a few numbers per layer, and scales per tensor
    tiles = 2 * GEOMETRY.layers * GEOMETRY.heads * (SEGMENT + SHARED) * (one.method == "adakv")
    held = turns(tiny, one)[0]["bytes"]
    assert held - counts <= expected <= 1.35 * held + counts + tiles


def test_a_cap_bounds_a_row() -> None:
    """Before, a row with a cap was counted as one that grows for ever."""
    capped, plain = (System("keepkv", "snapkv", 40, {"window": 8, **when}) for when in ({"when": When(cap=50)}, {}))
    assert row_bytes(GEOMETRY, capped, 100, 500) == row_bytes(GEOMETRY, plain, 100, 10)
    assert row_bytes(GEOMETRY, capped, 100, 5) == row_bytes(GEOMETRY, plain, 100, 5)


def test_growth_of_a_dense_store() -> None:
    assert [grown(0, 1), grown(0, 2), grown(100, 0), grown(100, 1), grown(160, 1)] == [1, 10, 100, 109, 171]


def test_quantised_groups_have_scales() -> None:
    numbers = 2 * 2 * 16 * 64  # of 64 tokens
    assert row_bytes(GEOMETRY, System("transformers", "quanto-4"), 64, 0) == numbers // 2 + numbers // 64 * 2 * 4


def test_cap_to_batch() -> None:
    assert read_cap("plain@2", GEOMETRY, 1000, 24) == 2 * 1024 * TOKEN
    assert read_cap("1MiB", GEOMETRY, 1000, 24) == 1 << 20
    assert [largest_batch(1000, row) for row in (1000, 501, 500, 300)] == [1, 1, 2, 3]
    with pytest.raises(KeepKVError, match=r"1,001 bytes, more than the cap of 1,000"):
        largest_batch(1000, 1001)
    for text in ("plain@0", "plain", "much", "full@2", "0.5"):
        with pytest.raises(KeepKVError):
            read_cap(text, GEOMETRY, 1000, 24)
    one = System("keepkv", "streaming-llm", 0.2)
    cap = read_cap("plain@2", GEOMETRY, 4096, 34)
    assert largest_batch(cap, row_bytes(GEOMETRY, one, 4096, 34)) == 8  # 2 / 0.2, less positions, new tokens and slack


def test_slots_of_a_budget() -> None:
    assert [slots_asked(b, 250) for b in (None, 0.1, 100, 300)] == [250, 25, 100, 250]
    with pytest.raises(KeepKVError, match="share or slots"):
        slots_asked("1MiB", 250)


# --- plan and rows ---------------------------------------------------------------------------------------------------


def test_the_plain_cache_is_in_every_block() -> None:
    ours = tuple(System("keepkv", "snapkv", budget) for budget in (0.1, 0.2, 0.3))
    assert blocks((PLAIN, *ours), 3) == [(PLAIN, *ours[:2]), (PLAIN, ours[2])]
    assert blocks(ours, 2) == [ours[:2], ours[2:]] and blocks((PLAIN,), 4) == [(PLAIN,)]


def test_equal_budgets_stand_together() -> None:
    both = [System(library, "adakv", budget) for library in ("keepkv", "kvpress") for budget in (0.2, 0.1)]
    assert by_budget([*both, PLAIN]) == (PLAIN, both[0], both[2], both[1], both[3])


def test_points() -> None:
    ours = tuple(System("keepkv", "snapkv", budget) for budget in (0.1, 0.2))
    sweep = Sweep((SHAPE,), (PLAIN, *ours), contexts=(100, 200), batches=(1, 4))
    found = list(points(sweep))
    assert [(p.context, p.batch, p.overhead) for p in found[:4]] == [(100, 1, False), (100, 4, False), (200, 1, False),
                                                                       (200, 4, False)]  # fmt: skip
    assert found[4].overhead and len(found) == 5
    assert at(found[4], sweep.systems) == (PLAIN, System("keepkv", "snapkv", 64))  # budgets are one there
    assert total(sweep) == 4 * 3 + 2
    assert {p.batch for p in points(dataclasses.replace(sweep, cap="plain@2")) if not p.overhead} == {None}
    assert hardly_anything(7).layers == 7


@pytest.mark.parametrize(
    "wrong", [{"contexts": ()}, {"repeats": 0}, {"together": 1}, {"dtype": "int8"}, {"batches": (0,)}]
)
def test_a_sweep_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(KeepKVError):
        Sweep((SHAPE,), (PLAIN,), **wrong)


def test_peers() -> None:
    names = [one.label for one in peers(["plain", "fp8", "kvpress:adakv", "kvpress:snapkv", "plain"], [0.1, 0.2])]
    assert names == ["plain", "fp8", *["kvpress:adakv"] * 2, *["kvpress:snapkv"] * 2]
    with pytest.raises(KeepKVError, match="Did you mean 'quanto-4'"):
        peers(["quanto-5"], [0.1])


def test_percentiles() -> None:
    found = Percentiles.of([5.0, 1.0, None, 2.0, 4.0, 3.0])
    assert found is not None
    assert (found.median, found.p20, found.p80) == pytest.approx((3.0, 1.8, 4.2))
    assert found.values == (5.0, 1.0, 2.0, 4.0, 3.0)
    assert Percentiles.of([None]) is None


def test_bandwidth_and_devices() -> None:
    assert min(hardware.bandwidths(torch.device("cpu"), 1, buffer=1 << 16)) > 0
    for name in ("warp", "cuda:99"):
        with pytest.raises(KeepKVError, match=name):
            hardware.open_device(name)
