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
    with pytest.raises(KeepKVError, match=r"^exact_first=4: without a codec every slot is exact"):
        made("dense", "none", exact_first=4)
    with pytest.raises(KeepKVError, match="exact_first"):
        made("ragged", "int4", exact_first=-1)


def test_what_no_method_merges_is_refused() -> None:
    with pytest.raises(KeepKVError, match=r"^exact_merged=4: this method merges no slots. Leave exact_merged out"):
        STORES.build("dense", Held(votes=False, codec=CODECS.build("int4")), exact_merged=4)


MERGED = 5


def in_order(slots: Slots) -> Slots:
    return slots.take(slots.positions.sort(dim=-1, stable=True).indices).select(slots.valid.sort(-1).values)


def merged(view: Slots, generator: torch.Generator) -> Slots:
    """``view`` after a merge: a third of its slots are new, of up to nine votes more, and of the others some leave."""
    shape = view.shape
    changes = view.valid & (torch.rand(shape, generator=generator) < 0.3)
    votes = (view.log_votes.exp() + changes * torch.randint(1, 10, shape, generator=generator)).log()
    keys, values = (
        torch.where(changes[..., None], x + torch.randn(x.shape, generator=generator), x)
        for x in (view.keys, view.values)
    )
    stays = view.valid & (changes | (torch.rand(shape, generator=generator) < 0.8))
    return in_order(Slots(keys, values, votes, view.positions).select(stays))


@layouts
@codecs
def test_slots_with_most_votes_stay_exact_and_codes_stay_codes(layout: str, codec: str) -> None:
    """Four merges with tokens in between. Of the slots that no codec wrote, the first, and of the others those with
    most votes, are read as they were given; what was a code and did not change is the same code."""
    store, (keys, values, positions) = made(layout, codec, exact_first=FIRST, exact_merged=MERGED), given()
    store.append(keys[:, :, :70], values[:, :, :70], positions[:, :70])
    store.after_prefill()
    codes = {(b, h, p) for b in range(B) for h in range(H) for p in range(FIRST, 70 - 32 - PADDING * b)}
    chosen, exact_slots = torch.Generator().manual_seed(2), 0
    for round_ in range(4):
        before = store.view()
        slots, codes_before = merged(before, chosen), codes
        successor = store.successor()
        successor.load(slots)
        store, view = successor, in_order(successor.view())
        assert torch.equal(view.positions, slots.positions)
        assert torch.equal(view.log_votes[view.valid], slots.log_votes[view.valid])
        codes = set()
        for b, h in ((b, h) for b in range(B) for h in range(H)):
            content = {int(p): s for s, p in enumerate(before.positions[b, h]) if p >= 0}
            free = []
            for s in view.valid[b, h].nonzero()[:, 0].tolist():
                place = int(view.positions[b, h, s])
                changed = not torch.equal(slots.keys[b, h, s], before.keys[b, h, content[place]])
                same = torch.equal(view.keys[b, h, s], slots.keys[b, h, s])
                same &= torch.equal(view.values[b, h, s], slots.values[b, h, s])
                if not changed and (b, h, place) in codes_before:
                    assert same, "a code that did not change is the same code"
                    codes.add((b, h, place))
                elif place < FIRST:
                    assert same
                else:
                    free.append((float(view.log_votes[b, h, s]), same))
                    codes |= set() if same else {(b, h, place)}
            exact = [votes for votes, same in free if same]
            assert len(exact) == MERGED and min(exact) >= max(votes for votes, same in free if not same)
            exact_slots += len(exact)
        more = slice(70 + 20 * round_, 90 + 20 * round_)
        store.append(keys[:, :, more], values[:, :, more], positions[:, more])
    assert exact_slots == 4 * B * H * MERGED


@layouts
@pytest.mark.parametrize("codec", ["int4", "kivi"])
def test_codes_are_never_the_newest_that_stay_exact(layout: str, codec: str) -> None:
    """Where the newest tokens leave, codes are the newest: they are not decoded and written a second time."""
    store, (keys, values, positions) = made(layout, codec, exact_last=LAST), given()
    store.append(keys, values, positions)
    store.after_prefill()
    view, successor = store.view(), store.successor()
    successor.load_kept(view, view.valid & (view.positions < T - PADDING - LAST))
    before = successor.view()
    for _ in range(3):
        successor.append(keys[:, :, :LAST], values[:, :, :LAST], positions[:, -LAST:])
        successor.after_prefill()
        successor.begin_decode()
    after, size = successor.view(), before.shape[2]
    where = after.positions[:, :, :size] == before.positions
    assert where.all() and torch.equal(after.keys[:, :, :size], before.keys)
    assert torch.equal(after.values[:, :, :size], before.values)
    assert wrong(before)[:, : T - PADDING - LAST].float().mean() > 0.9


@layouts
@codecs
def test_protected_tokens_are_exact_before_and_after_a_compression(layout: str, codec: str) -> None:
    """Other spans in each row, some of which come in a later chunk."""
    spans = torch.zeros(B, T, dtype=torch.bool)
    spans[0, 10:20] = spans[1, 25:28] = spans[0, 60:63] = spans[1, 100:104] = True

    def protects(at: torch.Tensor) -> torch.Tensor:
        return spans.gather(1, at.clamp_min(0).flatten(1).long()).view(at.shape) & (at >= 0)

    held = Held(codec=CODECS.build(codec), protects=protects)
    store, (keys, values, positions) = STORES.build(layout, held, exact_protected=True), given()
    for part in (slice(0, 70), slice(70, T)):
        store.append(keys[:, :, part], values[:, :, part], positions[:, part])
        store.after_prefill()
    off, before = wrong(store.view()), store.nbytes
    assert not off[spans].any() and off[:, :70][~spans[:, :70] & (torch.arange(70) < 60)].float().mean() > 0.8
    for _ in range(2):
        view, successor = store.view(), store.successor()
        keep = view.valid & (protects(view.positions) | (view.positions % 2 == 0))
        successor.load_kept(view, keep)
        store = successor
        assert not wrong(store.view())[spans].any() and torch.equal(store.view().lengths, keep.sum(-1))
    assert store.nbytes < before
    plain = made(layout, codec)
    plain.append(keys, values, positions)
    plain.after_prefill()
    assert wrong(plain.view())[spans].any()


@layouts
def test_a_store_may_hold_nothing_but_exact_slots(layout: str) -> None:
    store, (keys, values, positions) = made(layout, "int4", exact_first=FIRST, exact_merged=2 * T), given()
    store.append(keys, values, positions)
    for _ in range(3):
        view, successor = store.view(), store.successor()
        successor.load(view.select(view.positions % 3 < 2))
        store = successor
        twin = store.clone()
        assert not wrong(store.view()).any() and torch.equal(twin.view().keys, store.view().keys)
        assert store.positions().shape[2] == store.length and len(list(store.parts())) == 1
