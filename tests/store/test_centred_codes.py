"""Codes of keys without their head's mean: attention over them is that over the keys they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from keepkv.attention.attend import attend
from keepkv.attention.part import Part
from keepkv.core.slots import Slots
from keepkv.kernels.codes import Codes
from keepkv.store import CODECS, STORES, Store
from keepkv.store.base import Held

B, H, S, D, RECENT = 2, 2, 90, 16, 5


def made(store: str, codec: str, **options: Any) -> Store:
    """Keys of each row and head about a point of their own, far from zero; row 1 and head 1 hold fewer."""
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(B, H, S, D, generator=draw) for _ in range(2))
    keys += 30 * torch.randn(B, H, 1, D, generator=draw)
    positions = torch.arange(S, dtype=torch.int32).expand(B, H, S).clone()
    positions[1, :, :20], positions[:, 1, :7] = -1, -1
    votes = torch.rand(B, H, S, generator=draw)
    one = STORES.build(store, Held(codec=CODECS.build(codec, **options)))
    one.load(Slots(keys, values, votes, positions, {}))
    for at in range(S, S + RECENT):
        new = torch.randn(2, B, H, 1, D, generator=draw)
        one.append(new[0] + 30, new[1], torch.full((B, 1), at))
    return one


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize(("codec", "store"), [("hadamard", "dense"), ("hadamard", "ragged"), ("int4", "ragged")])
def test_attention_is_that_over_the_keys_they_stand_for(
    codec: str, store: str, softcap: float | None, sinks: Tensor | None, weights: bool
) -> None:
    one, query = made(store, codec), torch.randn(B, 2 * H, 1, D, generator=torch.Generator().manual_seed(1))
    coded = [part for part in one.parts() if isinstance(part.keys, Codes)]
    assert coded and all(part.shift is not None for part in coded)
    view, options = one.view(), {"softcap": softcap, "sinks": sinks, "weights": weights}
    exact = attend(query, [Part(view.keys, view.values, view.log_votes, view.positions)], 0.1, **options)
    found = attend(query, one.parts(), 0.1, **options)
    torch.testing.assert_close(found.output, exact.output, rtol=1e-4, atol=1e-4)
    several = torch.cat([query] * 3, 2)
    again = attend(several, one.parts(), 0.1, softcap=softcap, sinks=sinks)
    torch.testing.assert_close(again.output, exact.output.expand(-1, -1, 3, -1), rtol=1e-4, atol=1e-4)


def test_codes_are_of_what_keys_do_not_have_in_common() -> None:
    """The same bits, but for the mean, and a fraction of the error; by default only where keys have few bits."""
    lost = {}
    for centre in (True, False):
        one, whole = made("dense", "hadamard", centre=centre), made("dense", "none")
        inside = whole.view().positions >= 0
        lost[centre] = float((one.view().keys - whole.view().keys)[inside].square().mean().sqrt())
    assert lost[True] < 0.2 * lost[False], lost
    assert [CODECS.build("hadamard", bits=n).centre for n in (2, 4, 8)] == [True, True, False]
    assert CODECS.build("hadamard", key_bits=8).centre is False


def test_rows_keep_their_own_mean_where_they_move_and_join() -> None:
    one, other = made("ragged", "hadamard"), made("ragged", "hadamard")
    before = one.view()
    one.index(torch.tensor([1]))
    other.join(one)
    joined = other.view()
    for row, of in ((0, 0), (1, 1), (2, 1)):
        # The newest are exact until they move: here they are written as codes.
        held, told = ((x >= 0) & (x < S) for x in (joined.positions[row], before.positions[of]))
        assert torch.equal(joined.keys[row][held], before.keys[of][told])
