"""Stores: every layout holds the same slots, attends the same, and frees what it does not keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from matrix import sampled
from running import LENGTHS, batch, generate, row

import keepkv
from keepkv.attention.attend import attend
from keepkv.core.slots import EMPTY, Slots
from keepkv.engine.versions import CACHE
from keepkv.store import CODECS, STORES, Held, Store

B, H, G, D = 2, 3, 2, 8
STATS = {"mass": 0.0, "log_seen": -1.0}


# Of a normal number; 2 at 2 bits, and all of it where its channel is dropped.
LOSS = {"none": 0.0, "int8": 0.08, "fp8": 0.3, "int4": 0.5, "hadamard": 0.5, "think": 5.0}
# Heads of these slots hold different tokens; codecs that write heads together have tests of their own.
BY_HEAD = [codec for codec in CODECS if not CODECS.factory(codec).together]  # type: ignore[attr-defined]
KINDS = [("static", "none"), *((layout, codec) for codec in BY_HEAD for layout in ("dense", "ragged"))]
GENERATING = [
    ("ragged", "none"), ("static", "none"), ("dense", "int8"), ("ragged", "int8"), ("dense", "kvquant"),
    ("ragged", "kivi"), ("dense", "hadamard"), ("ragged", "lloyd-max"),
]  # fmt: skip
EXACT = [kind for kind in KINDS if kind[1] == "none"]
per_kind = pytest.mark.parametrize("kind", KINDS, ids="-".join)
per_exact_kind = pytest.mark.parametrize("kind", EXACT, ids="-".join)


def make(layout: str, codec: str = "none") -> Store:
    return STORES.build(layout, held=Held(STATS, codec=CODECS.build(codec)))


def random_slots(lengths: torch.Tensor, votes: bool = True, dtype: torch.dtype = torch.float32) -> Slots:
    """Slots with ``lengths`` (B,H) valid ones in each head, empties first."""
    b, h = lengths.shape
    size = int(lengths.max())
    valid = torch.arange(size) >= size - lengths[..., None]
    positions = torch.arange(size).expand(b, h, -1).masked_fill(~valid, EMPTY).to(torch.int32)
    log_votes = torch.rand(b, h, size) if votes else torch.zeros(b, h, size)
    stats = {"mass": torch.rand(b, h, size), "log_seen": torch.rand(b, h, size)}
    return Slots(
        torch.randn(b, h, size, D, dtype=dtype), torch.randn(b, h, size, D, dtype=dtype), log_votes, positions, stats
    )


def same_slots(one: Slots, two: Slots) -> None:
    """Equal where valid, whatever the number of empty columns in front."""
    assert torch.equal(one.lengths, two.lengths)
    for name in ("keys", "values", "log_votes", "positions"):
        assert torch.equal(getattr(one, name)[one.valid], getattr(two, name)[two.valid]), name
    for name, x in one.stats.items():
        assert torch.equal(x[one.valid], two.stats[name][two.valid]), name


LENS = torch.tensor([[5, 9, 1], [7, 2, 6]])


@per_exact_kind
@pytest.mark.parametrize("votes", [True, False])
def test_load_append_view(kind: tuple[str, str], votes: bool) -> None:
    """What is loaded and appended comes back, and attention over the parts equals attention over the view."""
    store, slots = make(*kind), random_slots(LENS, votes)
    store.append(torch.randn(B, H, 4, D), torch.randn(B, H, 4, D), torch.arange(4).expand(B, 4))
    assert store.appended == 4
    store.load(slots)
    same_slots(store.view(), slots)
    assert store.appended == 0
    keys, values = torch.randn(B, H, 3, D), torch.randn(B, H, 3, D)
    for t in range(3):
        store.append(keys[:, :, t : t + 1], values[:, :, t : t + 1], torch.full((B, 1), 20 + t))
    view = store.view()
    assert torch.equal(view.keys[:, :, -3:], keys) and torch.equal(view.values[:, :, -3:], values)
    assert (view.stats["log_seen"][:, :, -3:] == -1.0).all() and store.appended == 3
    query = torch.randn(B, H * G, 1, D)
    reference = naive(query, view)
    assert torch.allclose(attend(query, store.parts(), D**-0.5).output, reference, atol=1e-5)


def naive(query: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Float64 attention, slot by slot."""
    out = torch.zeros(*query.shape[:3], slots.values.shape[-1], dtype=torch.float64)
    for b in range(query.shape[0]):
        for head in range(query.shape[1]):
            h = head // G
            valid = slots.valid[b, h]
            logits = slots.keys[b, h, valid].double() @ query[b, head, 0].double() * D**-0.5
            weights = (logits + slots.log_votes[b, h, valid].double()).softmax(0)
            out[b, head, 0] = weights @ slots.values[b, h, valid].double()
    return out.float()


@per_kind
def test_rows_crop_clone_restore(kind: tuple[str, str]) -> None:
    store = make(*kind)
    store.load(random_slots(LENS))
    for t in range(3):
        store.append(torch.randn(B, H, 1, D), torch.randn(B, H, 1, D), torch.full((B, 1), 20 + t))
    before, twin = store.clone().view(), store.clone()
    again = store.empty()
    again.restore({k: v.clone() for k, v in store.tensors().items()})
    store.crop(2)
    assert store.length == before.positions.shape[2] - 2 and store.appended == 1
    same_slots(twin.view(), before)
    same_slots(again.view(), before)
    twin.index(torch.tensor([1, 0, 1]))
    got = twin.view()
    for i, source in enumerate([1, 0, 1]):
        assert torch.equal(got.keys[i][got.valid[i]], before.keys[source][before.valid[source]])


@per_kind
def test_statistics_written_through_a_view_are_kept(kind: tuple[str, str]) -> None:
    store = make(*kind)
    store.load(random_slots(LENS))
    store.append(torch.randn(B, H, 1, D), torch.randn(B, H, 1, D), torch.full((B, 1), 20))
    view = store.live_view()
    view.stats["mass"].add_(1.0)
    if not store.views_share_memory:
        store.write_stats(view.stats)
    got = store.view()
    assert torch.equal(got.stats["mass"][got.valid], view.stats["mass"][view.valid])


def test_flat_store_holds_exactly_its_slots() -> None:
    store = make("ragged")
    store.load(random_slots(LENS, votes=False))
    per_slot = 2 * D * 4 + 4 + 4 * len(STATS)
    assert (
        store.nbytes == int(LENS.sum()) * per_slot + LENS.numel() * 2 * 8
    )  # where each head begins, and how long it is


def test_dense_growth_copies_rarely() -> None:
    """Decode appends in place: few reallocations, slack bounded."""
    store, addresses = make("dense"), set()
    store.append(torch.randn(1, 1, 500, D), torch.randn(1, 1, 500, D), torch.arange(500)[None])
    for t in range(400):
        store.append(torch.randn(1, 1, 1, D), torch.randn(1, 1, 1, D), torch.full((1, 1), 500 + t))
        addresses.add(store.tensors()["keys"].data_ptr())
    assert len(addresses) <= 14
    assert store.tensors()["keys"].shape[2] <= store.length * 17 / 16 + 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_int8_error_is_that_of_its_scales(layout: str, dtype: torch.dtype) -> None:
    """Each decoded entry is within half a step of its slot's scale, the newest 32 are exact, bytes are halved."""
    store, slots = make(layout, "int8"), random_slots(torch.full((B, H), 300), votes=False, dtype=dtype)
    store.append(slots.keys, slots.values, torch.arange(300).expand(B, -1))
    store.after_prefill()
    for got, exact in ((store.view(), 32), (loaded(store, slots), 0)):
        for name in ("keys", "values"):
            want, have = getattr(slots, name).float(), getattr(got, name).float()
            step = want.abs().amax(-1, keepdim=True) / 127
            slop = want.abs() * torch.finfo(dtype).eps * 2 if dtype != torch.float32 else 1e-6
            assert ((want - have).abs() <= 0.5 * step + slop).all()
            assert torch.equal(want[:, :, 300 - exact :], have[:, :, 300 - exact :])
    assert sum(x.dtype == torch.int8 for x in store.tensors().values()) == 2
    content = 2 * D * 1 + 2 * dtype.itemsize
    assert store.slot_bytes() == (H * content, H * (4 + 4 + 4 * len(STATS)), H * 2 * D * dtype.itemsize)


def loaded(store: Store, slots: Slots) -> Slots:
    store.load(slots)
    return store.view()


@per_kind
def test_joined_rows_are_those_of_each(kind: tuple[str, str]) -> None:
    """Rows of two stores, with tokens appended since: each is what it was, and nothing is held for the shorter ones of
    a ragged store."""
    stores = [make(*kind), make(*kind)]
    for store, lengths in zip(stores, (LENS, LENS[:1] + 4), strict=True):
        store.load(random_slots(lengths, votes=store is stores[1]))
    stores[0].append(torch.randn(B, H, 2, D), torch.randn(B, H, 2, D), torch.full((B, 2), 20))
    alone = [store.view().map(torch.clone) for store in stores]
    stores[0].join(stores[1])
    got = stores[0].view()
    assert stores[0].lengths.tolist() == [*(LENS + 2).tolist(), *(LENS[:1] + 4).tolist()]
    for i, (slots, source) in enumerate([(alone[0], 0), (alone[0], 1), (alone[1], 0)]):
        valid, there = got.valid[i], slots.valid[source]
        for name in ("keys", "values"):
            ours, theirs = getattr(got, name)[i][valid], getattr(slots, name)[source][there]
            assert torch.allclose(ours, theirs, atol=LOSS.get(kind[1], 2.0), rtol=0), name  # a ragged store encodes
        assert torch.equal(got.log_votes[i][valid], slots.log_votes[source][there])
        assert all(torch.equal(got.stats[name][i][valid], slots.stats[name][source][there]) for name in STATS)
    if kind == ("ragged", "none"):
        slots_held = int(LENS.sum() + 2 * LENS.numel() + (LENS[:1] + 4).sum())
        assert stores[0].tensors()["body.keys"].shape == (slots_held, D)


@per_kind
def test_rows_join_after_all_that_was_appended_is_taken_back(kind: tuple[str, str]) -> None:
    """And go on. Without the guard a ragged store appended three rows to buffers of two: an error of torch."""
    stores = [make(*kind), make(*kind)]
    for store, lengths in zip(stores, (LENS, LENS[:1]), strict=True):
        store.load(random_slots(lengths))
    stores[0].append(torch.randn(B, H, 1, D), torch.randn(B, H, 1, D), torch.full((B, 1), 20))
    stores[0].crop(1)
    stores[0].join(stores[1])
    stores[0].append(torch.randn(B + 1, H, 1, D), torch.randn(B + 1, H, 1, D), torch.full((B + 1, 1), 20))
    assert stores[0].lengths.tolist() == [*(LENS + 1).tolist(), (LENS[0] + 1).tolist()]


@pytest.mark.parametrize(
    ("arch", "every", "kind"),
    sampled(
        2,
        ["llama", "gemma3", "gpt-neox", "gpt-oss", "deepseek-v3"],
        [None, 3],
        [pytest.param(x, id="-".join(x)) for x in GENERATING],
    ),
)
def test_every_store_generates_what_dense_does(arch: str, kind: tuple[str, str], every: int | None) -> None:
    """Through the one handle, on a left-padded batch: exact codecs to rounding; int8 rows equal rows alone."""
    model, options = zoo.model(arch), {"sinks": 2, "when": keepkv.When(every=every)}
    layout, codec = kind
    extra: dict[str, Any] = {"store_options": {"capacity": 96}} if layout == "static" else {}
    mine = keepkv.Cache(model, "random", 14, store=layout, codec=codec, **extra, **options)
    out = generate(model, batch(), mine)
    if codec == "none":
        reference = generate(model, batch(), keepkv.Cache(model, "random", 14, store="dense", **options))
        assert torch.allclose(out.scores_, reference.scores_, atol=1e-5)
        return
    for i in range(len(LENGTHS)):
        alone = keepkv.Cache(model, "random", 14, store=layout, codec=codec, **options)
        scores = generate(model, row(batch(), i), alone).scores_
        # Which tokens are encoded when depends on padded columns only in time, not in content: small differences.
        assert torch.allclose(scores[0], out.scores_[i], atol=0.1 if codec == "int8" else 1.0)


def test_a_full_static_store_says_so() -> None:
    model = zoo.model("llama")
    small = keepkv.Cache(model, "full", store="static", store_options={"capacity": 64})
    with pytest.raises(keepkv.KeepKVError, match="capacity"):
        generate(model, row(batch(), 0), small, new=10)


def test_pairs_that_do_not_work_are_refused() -> None:
    model = zoo.model("llama")
    for options, message in (
        ({"store": "static", "codec": "int8"}, "holds slots as they are"),
        ({"store": "dense", "method": "adakv"}, "as wide as the fullest head"),
        ({"store": "flat", "codec": "int8"}, "former name"),
        ({"store": "squashed"}, "unknown store"),
        ({"codec": "int7"}, "unknown codec"),
    ):
        with pytest.raises(keepkv.KeepKVError, match=message):
            keepkv.Cache(model, **{"method": "snapkv", "budget": 40, **options})
    former = keepkv.Cache(model, "snapkv", 40, store="int8"), keepkv.Cache(model, "adakv", 40, store="flat")
    assert [(x.layout, x.codec) for x in former] == [("dense", "int8"), ("ragged", "none")]


@pytest.mark.parametrize("budget", [0.25, 16])
def test_ragged_int8_frees_what_it_says(budget: float) -> None:
    """Heads of different lengths in 8 bits: bytes are those of the slots kept, not of the fullest head."""
    model = zoo.model("llama")
    cache = keepkv.Cache(model, "adakv", budget, codec="int8", window=4, sinks=2)
    inputs = row(batch((60,)), 0)
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
    allowed = budget if isinstance(budget, int) else int(60 * budget)
    for layer in cache.compressible:
        lengths, (content, beside, plain) = layer.store.lengths, layer.store.slot_bytes()
        assert lengths.sum() == allowed * lengths.numel() and len(lengths.unique()) > 1
        assert content < plain and layer.store.nbytes <= allowed * (content + beside) + 16 * lengths.numel()


def test_a_byte_budget_counts_bytes_as_they_are_held() -> None:
    """With int8 it holds about as many more slots as they are smaller."""
    model, kept = zoo.model("llama"), {}
    for codec in ("none", "int8"):
        cache = keepkv.Cache(model, "knorm", "20KB", codec=codec, sinks=0)
        with torch.no_grad():
            model(**row(batch((90,)), 0), **{CACHE: cache})
        kept[codec] = cache.report().kept[0][0][0]
        sizes = cache.compressible[0].store.slot_bytes()
        allowed = 20_000 // (len(cache.compressible) * (sizes.content + sizes.beside))
        assert kept[codec] == allowed and cache.report().bytes <= 20_000 * 1.03
    assert kept["int8"] > 1.5 * kept["none"]
