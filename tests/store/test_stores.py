"""Stores: every layout holds the same slots, attends the same, and frees what it does not keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from running import LENGTHS, batch, generate, row

import keepkv
from keepkv.attention.attend import attend
from keepkv.core.slots import EMPTY, Slots
from keepkv.store import STORES, Store

B, H, G, D = 2, 3, 2, 8
STATS = {"mass": 0.0, "log_seen": -1.0}


def make(name: str) -> Store:
    return STORES.build(name, stats=dict(STATS))


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


@pytest.mark.parametrize("name", ["dense", "flat", "static"])
@pytest.mark.parametrize("votes", [True, False])
def test_load_append_view(name: str, votes: bool) -> None:
    """What is loaded and appended comes back, and attention over the parts equals attention over the view."""
    store, slots = make(name), random_slots(LENS, votes)
    store.append(torch.randn(B, H, 4, D), torch.randn(B, H, 4, D), torch.arange(4).expand(B, 4))
    assert store.tail == 4
    store.load(slots)
    same_slots(store.view(), slots)
    assert store.tail == 0
    keys, values = torch.randn(B, H, 3, D), torch.randn(B, H, 3, D)
    for t in range(3):
        store.append(keys[:, :, t : t + 1], values[:, :, t : t + 1], torch.full((B, 1), 20 + t))
    view = store.view()
    assert torch.equal(view.keys[:, :, -3:], keys) and torch.equal(view.values[:, :, -3:], values)
    assert (view.stats["log_seen"][:, :, -3:] == -1.0).all() and store.tail == 3
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


@pytest.mark.parametrize("name", ["dense", "flat", "static", "int8"])
def test_rows_crop_clone_restore(name: str) -> None:
    store = make(name)
    store.load(random_slots(LENS))
    for t in range(3):
        store.append(torch.randn(B, H, 1, D), torch.randn(B, H, 1, D), torch.full((B, 1), 20 + t))
    before, twin = store.clone().view(), store.clone()
    again = store.empty()
    again.restore({k: v.clone() for k, v in store.tensors().items()})
    store.crop(2)
    assert store.length == before.positions.shape[2] - 2 and store.tail == 1
    same_slots(twin.view(), before)
    same_slots(again.view(), before)
    twin.index(torch.tensor([1, 0, 1]))
    got = twin.view()
    for i, source in enumerate([1, 0, 1]):
        assert torch.equal(got.keys[i][got.valid[i]], before.keys[source][before.valid[source]])


@pytest.mark.parametrize("name", ["dense", "flat", "static", "int8"])
def test_statistics_written_through_a_view_are_kept(name: str) -> None:
    store = make(name)
    store.load(random_slots(LENS))
    store.append(torch.randn(B, H, 1, D), torch.randn(B, H, 1, D), torch.full((B, 1), 20))
    view = store.live_view()
    view.stats["mass"].add_(1.0)
    if not store.views_share_memory:
        store.put(view.stats)
    got = store.view()
    assert torch.equal(got.stats["mass"][got.valid], view.stats["mass"][view.valid])


def test_flat_store_holds_exactly_its_slots() -> None:
    store = make("flat")
    store.load(random_slots(LENS, votes=False))
    per_slot = 2 * D * 4 + 4 + 4 * len(STATS)
    assert store.nbytes == int(LENS.sum()) * per_slot + LENS.numel() * 8


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
def test_int8_error_is_that_of_its_scales(dtype: torch.dtype) -> None:
    """Each dequantised entry is within half a step of its slot's scale, the residual is exact, bytes are halved."""
    store = make("int8")
    slots = random_slots(torch.full((B, H), 300), votes=False, dtype=dtype)
    store.load(slots)
    got = store.view()
    for name in ("keys", "values"):
        want, have = getattr(slots, name).float(), getattr(got, name).float()
        step = want.abs().amax(-1, keepdim=True) / 127
        slop = want.abs() * torch.finfo(dtype).eps * 2 if dtype != torch.float32 else 1e-6
        assert ((want - have).abs() <= 0.5 * step + slop).all()
        assert torch.equal(want[:, :, -32:], have[:, :, -32:])
    if dtype == torch.bfloat16:
        packed = [x for n, x in store.tensors().items() if n in ("body.keys", "body.values")]
        assert all(x.dtype == torch.int8 for x in packed)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt-neox", "gpt-oss", "deepseek-v3"])
@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("store", ["flat", "static", "int8"])
def test_every_store_generates_what_dense_does(arch: str, store: str, every: int | None) -> None:
    """Through the one handle, on a left-padded batch: exact layouts to rounding; int8 rows equal rows alone."""
    model, options = zoo.model(arch), {"sinks": 2, "when": keepkv.When(every=every)}
    extra: dict[str, Any] = {"store_options": {"capacity": 96}} if store == "static" else {}
    mine = keepkv.Cache(model, "random", 14, store=store, **extra, **options)
    out = generate(model, batch(), mine)
    if store != "int8":
        reference = generate(model, batch(), keepkv.Cache(model, "random", 14, store="dense", **options))
        assert torch.allclose(out.scores_, reference.scores_, atol=1e-5)
        return
    for i in range(len(LENGTHS)):
        alone = generate(model, row(batch(), i), keepkv.Cache(model, "random", 14, store=store, **options))
        # Which tokens are packed when depends on padded columns only in time, not in content: small differences.
        assert torch.allclose(alone.scores_[0], out.scores_[i], atol=0.1)


def test_a_full_static_store_says_so() -> None:
    model = zoo.model("llama")
    small = keepkv.Cache(model, "full", store="static", store_options={"capacity": 64})
    with pytest.raises(keepkv.KeepKVError, match="capacity"):
        generate(model, row(batch(), 0), small, new=10)
