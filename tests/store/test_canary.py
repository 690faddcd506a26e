"""The canary: every way to spoil a slot behind a store's back raises, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from running import LENGTHS, batch, generate
from test_stores import KINDS, LENS, B, D, H, make, random_slots

import keepkv
from keepkv.core.layer_info import LayerInfo
from keepkv.errors import CacheStateError
from keepkv.store import Held, guarded
from keepkv.store.canary import Canary

per_kind = pytest.mark.parametrize("kind", KINDS, ids="-".join)


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPKV_CANARY", "1")


def filled(kind: tuple[str, str]) -> Canary:
    """Slots that were loaded, and 40 tokens appended since: some of them encoded where the codec does that."""
    store = guarded(make(*kind))
    assert isinstance(store, Canary)
    store.load(random_slots(LENS))
    store.append(torch.randn(B, H, 40, D), torch.randn(B, H, 40, D), torch.arange(20, 60).expand(B, 40))
    store.after_prefill()
    return store


def read(store: Canary) -> None:
    """In both ways."""
    store.view()
    list(store.parts())


def token(store: Canary, position: int) -> None:
    store.begin_decode()
    rows = store.lengths.shape[0]
    store.append(torch.randn(rows, H, 1, D), torch.randn(rows, H, 1, D), torch.full((rows, 1), position))


@per_kind
def test_what_stores_do_is_no_alarm(kind: tuple[str, str]) -> None:
    store = filled(kind)
    read(store)
    for step in range(70):  # as many as a codec leaves exact, and more
        token(store, 60 + step)
        read(store)
    store.crop(2)
    store.index(torch.tensor([1, 0, 1]))
    twin, other = store.clone(), filled(kind)
    assert isinstance(twin, Canary)
    again = store.empty()
    again.restore({name: x.clone() for name, x in store.tensors().items()})
    for one in (store, twin, again):
        assert isinstance(one, Canary)
        read(one)
    store.join(other)
    read(store)
    token(store, 200)
    slots = store.view()
    store.load_kept(slots, slots.valid & (slots.positions % 3 > 0))
    read(store)
    token(store, 201)
    store.hide(torch.full((5,), 201))
    read(store)


@per_kind
def test_one_slot_that_is_overwritten(kind: tuple[str, str]) -> None:
    """Any of its fields, in any zone, whoever reads it: a view, attention, a copy, a file."""
    watched = ("keys", "values", "scale", "positions", "log_votes")
    fields = [name for name in filled(kind).inner.tensors() if name.endswith(watched) and "shared" not in name]
    assert len(fields) >= 4
    for field in fields:
        for reader in (Canary.view, read, Canary.clone, Canary.tensors):
            store = filled(kind)
            overwrite(store, field)
            with pytest.raises(CacheStateError, match=r"canary: .* of layer 0, row 0, head 0 found in slot \d+ of"):
                reader(store)


def overwrite(store: Canary, field: str) -> None:
    """Add 1 to ``field`` of a slot of the first row and head."""
    tensors = store.inner.tensors()
    x, zone = tensors[field], field.rpartition(".")[0]
    if x.dim() < 3:  # ragged
        x[0] += 1
        return
    counts = tensors.get(f"{zone}.counts" if zone else "counts")
    used = store.inner.length if counts is None else int(counts[0])
    x[0, 0, used - 1] += 1


def rows_swapped(store: Canary) -> None:
    store.inner.index(torch.tensor([1, 0]))


def head_mixed_up(store: Canary) -> None:
    slots = store.inner.view()
    store.inner.load(slots.map(lambda x: x.flip(1)))


def one_lost(store: Canary) -> None:
    slots = store.inner.view()
    store.inner.load_kept(slots, slots.valid & (slots.positions != 21))


def order_turned(store: Canary) -> None:
    slots = store.inner.view()
    store.inner.load(slots.map(lambda x: x.flip(2)))


@per_kind
@pytest.mark.parametrize("mixed", [rows_swapped, head_mixed_up, one_lost, order_turned])
def test_slots_that_are_taken_from_elsewhere(kind: tuple[str, str], mixed: Callable[[Canary], None]) -> None:
    store = filled(kind)
    mixed(store)
    with pytest.raises(CacheStateError, match="canary"):
        read(store)


def test_it_names_the_slot() -> None:
    store = guarded(make("dense").empty(Held(layer=LayerInfo(index=5))))
    slots = random_slots(LENS).with_(stats={})
    store.load(slots)
    assert isinstance(store, Canary)
    store.inner.tensors()["values"][1, 2, -2] += 1
    position = int(slots.positions[1, 2, -2])
    with pytest.raises(CacheStateError, match=rf"layer 5, row 1, head 2 found in slot 4 of 6 \(position {position}\)"):
        store.view()


@pytest.mark.parametrize("arch", ["llama", "gemma3", "deepseek-v3"])
@pytest.mark.parametrize("store", [{}, {"store": "static", "store_options": {"capacity": 96}}, {"codec": "int8"}])
def test_caches_under_it_answer_as_before(arch: str, store: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def answer() -> torch.Tensor:
        cache = keepkv.Cache(zoo.model(arch), "random", 14, sinks=2, when=keepkv.When(every=3), **store)
        assert isinstance(cache.compressible[0].store, Canary) == watching
        scores: torch.Tensor = generate(zoo.model(arch), batch(LENGTHS), cache).scores_
        return scores

    watching = True
    watched = answer()
    watching = False
    monkeypatch.delenv("KEEPKV_CANARY")
    assert torch.allclose(watched, answer(), atol=1e-6)


def test_off_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPKV_CANARY", "0")
    store = make("dense")
    assert guarded(store) is store
