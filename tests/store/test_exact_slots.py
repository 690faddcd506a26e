"""Slots that stay exact beside codes: the first tokens of a row, and the newest."""

from __future__ import annotations

import pytest
import torch

from keepkv.core.slots import Slots
from keepkv.errors import KeepKVError
from keepkv.store import CODECS, STORES
from keepkv.store.base import Held, Store

B, H, T, D = 2, 3, 150, 16
FIRST, LAST = 4, 40
PADDING = 7  # of the second row


def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(B, H, T, D, generator=made) for _ in range(2))
    positions = torch.arange(T).repeat(B, 1)
    positions[1] = (positions[1] - PADDING).clamp_min(-1)
    return keys, values, positions


def made(layout: str, codec: str, **options: int) -> Store:
    return STORES.build(layout, Held(codec=CODECS.build(codec)), **options)


def wrong(view: Slots) -> torch.Tensor:
    """(B,T) bool: tokens whose content in any head differs from what was given."""
    keys, values, positions = given()
    off = torch.zeros(B, T, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            for s in view.valid[b, h].nonzero()[:, 0]:
                place = int(view.positions[b, h, s])
                column = int((positions[b] == place).nonzero()[0, 0])
                same = torch.equal(view.keys[b, h, s], keys[b, h, column])
                off[b, place] |= not (same and torch.equal(view.values[b, h, s], values[b, h, column]))
    return off


layouts = pytest.mark.parametrize("layout", ["dense", "ragged"])
codecs = pytest.mark.parametrize("codec", ["int4", "kivi"])


@layouts
@codecs
def test_first_and_newest_tokens_are_exact_while_tokens_come(layout: str, codec: str) -> None:
    """Without a compression too: a prompt, then tokens one by one, until all but the newest are encoded."""
    store, (keys, values, positions) = made(layout, codec, exact_first=FIRST, exact_last=LAST), given()
    store.append(keys[:, :, :80], values[:, :, :80], positions[:, :80])
    store.after_prefill()
    for t in range(80, T):
        store.begin_decode()
        store.append(keys[:, :, t : t + 1], values[:, :, t : t + 1], positions[:, t : t + 1])
    off = wrong(view := store.view())
    assert view.lengths.tolist() == [[T] * H, [T - PADDING] * H] == store.lengths.tolist()
    assert torch.equal(store.positions(), view.positions)
    assert not off[:, :FIRST].any() and not off[0, T - LAST :].any() and not off[1, T - PADDING - LAST :].any()
    assert off[:, FIRST:40].float().mean() > 0.9  # the others are codes
    plain = made(layout, codec)
    plain.append(keys, values, positions)
    plain.after_prefill()
    assert wrong(plain.view())[:, :FIRST].any()  # which they are without the options


@layouts
@codecs
def test_compressions_keep_them_exact_and_write_no_code_twice(layout: str, codec: str) -> None:
    store, (keys, values, positions) = made(layout, codec, exact_first=FIRST, exact_last=LAST), given()
    store.append(keys, values, positions)
    store.after_prefill()
    before, chosen = store.view(), torch.Generator().manual_seed(1)
    where = {(b, h, int(p)): s for b in range(B) for h in range(H) for s, p in enumerate(before.positions[b, h])}
    for round_ in range(4):
        view = store.view()
        keep = view.valid & (torch.rand(view.shape, generator=chosen) < 0.8)
        keep |= view.valid & ((view.positions < FIRST) | (view.positions >= T - 10))
        successor = store.successor()
        (successor.load_kept(view, keep) if round_ % 2 else successor.load(view.select(keep)))
        store, view = successor, successor.view()
        assert torch.equal(view.lengths, keep.sum(-1))
        assert not wrong(view)[:, :FIRST].any() and not wrong(view)[0, T - LAST :].any()
        for b, h, s in view.valid.nonzero().tolist():  # what was a code is the same code
            old = where[b, h, int(view.positions[b, h, s])]
            assert torch.equal(view.keys[b, h, s], before.keys[b, h, old])
            assert torch.equal(view.values[b, h, s], before.values[b, h, old])


@layouts
def test_statistics_and_rows_find_their_slots(layout: str) -> None:
    held = Held(stats={"mass": 0.0}, codec=CODECS.build("int4"))
    store = STORES.build(layout, held, exact_first=FIRST)
    keys, values, positions = given()
    store.append(keys, values, positions)
    store.after_prefill()
    view = store.view()
    store.write_stats({"mass": view.positions.float()})
    successor = store.successor()
    view = store.view()
    successor.load_kept(view, view.valid & (view.positions % 3 != 1))
    successor.index(torch.tensor([1, 0, 1]))
    other = successor.clone()
    successor.join(other)
    found = successor.view()
    assert torch.equal(found.stats["mass"][found.valid], found.positions[found.valid].float())
    assert found.lengths[:, 0].tolist() == [95, 100, 95] * 2
    twin = successor.empty()
    twin.restore({name: x.clone() for name, x in successor.tensors().items()})
    assert torch.equal(twin.view().keys, found.keys) and torch.equal(twin.positions(), found.positions)


def test_without_a_codec_they_are_refused() -> None:
    with pytest.raises(KeepKVError, match="exact_first=4, exact_last=0: without a codec every slot is exact"):
        made("dense", "none", exact_first=4)
    with pytest.raises(KeepKVError, match="exact_first"):
        made("ragged", "int4", exact_first=-1)
