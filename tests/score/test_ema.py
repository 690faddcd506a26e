"""The EMA score over streams: chunks, padding, decoding. Its formula is test 16 of ``test_keepkv``."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_views import make_view, padded
from torch import Tensor

from keepkv.core.slots import LayerView, Slots
from keepkv.score.queries.ema import STAT, Ema

torch.set_num_threads(1)
F64 = torch.float64
FEW = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)


def part(whole: LayerView, begin: int, end: int, held: Tensor, state: dict[str, Tensor]) -> LayerView:
    """The view after the forward of tokens begin … end−1 of an uncompressed stream."""
    s = whole.slots
    fresh = torch.full((*held.shape[:2], end - held.shape[2]), -math.inf, dtype=held.dtype)
    return LayerView(
        Slots(s.keys[:, :, :end], s.values[:, :, :end], s.log_votes[..., :end], s.positions[..., :end],
              {STAT: torch.cat((held, fresh), -1)}),
        whole.queries[:, :, begin:end], whole.query_positions[:, begin:end], torch.tensor([end]), whole.scaling, state,
    )  # fmt: skip


def stream(whole: LayerView, ends: list[int], score: Ema) -> Tensor:
    state: dict[str, Tensor] = {}
    held = torch.empty(1, whole.slots.shape[1], 0, dtype=whole.slots.keys.dtype)
    for begin, end in zip([0, *ends], ends, strict=False):
        view = part(whole, begin, end, held, state)
        score.observe(view)
        held = view.slots.stats[STAT]
    return held.exp()


@given(seed=seeds, cuts=st.sets(st.sampled_from(range(2, 27, 2)), max_size=6), decoded=st.integers(0, 6))
@FEW
def test_ema_of_a_chunked_prefill_is_that_of_one_shot(seed: int, cuts: set[int], decoded: int) -> None:
    whole = make_view(seed, groups=2, slots=34, queries=34)
    tail = list(range(28, 29 + decoded))
    for window in (0, 3, 40):
        one, many = (stream(whole, [*sorted(c), *tail], Ema(window=window)) for c in (set[int](), cuts))
        torch.testing.assert_close(one, many, rtol=1e-10, atol=1e-14)


def test_ema_of_a_padded_row_in_a_batch() -> None:
    """Two rows of different length, prefill and decode, against each row alone; large logits in float32."""
    score = Ema(window=5)
    long, short = (make_view(s, slots=n, queries=n, dtype=torch.float32, scale=40.0) for s, n in ((1, 20), (2, 13)))
    state: dict[str, Tensor] = {}
    held = torch.full((2, 2, 16), -math.inf)
    for begin, end in ((0, 16), (16, 17), (17, 18), (18, 20)):
        cut = padded(part(short, max(begin - 7, 0), end - 7, torch.empty(1, 2, 0), {}), 7, 7 if begin == 0 else 0)
        top = part(long, begin, end, torch.empty(1, 2, 0), {})
        both = [torch.cat(p) for p in ((top.slots.keys, cut.slots.keys), (top.slots.values, cut.slots.values),
                (top.slots.log_votes, cut.slots.log_votes), (top.slots.positions, cut.slots.positions))]  # fmt: skip
        held = torch.cat((held, torch.full((2, 2, end - held.shape[2]), -math.inf)), -1)
        view = LayerView(
            Slots(*both, {STAT: held}), torch.cat((top.queries, cut.queries)),
            torch.cat((top.query_positions, cut.query_positions)), torch.tensor([end, end - 7]), long.scaling, state,
        )  # fmt: skip
        score.observe(view)
        got = score(view)
        assert got.isfinite().all()
    torch.testing.assert_close(got[:1], stream(long, [16, 17, 18, 20], score), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1:, :, 7:], stream(short, [9, 10, 11, 13], score), rtol=1e-5, atol=1e-6)
    assert (got[1:, :, :7] == 0).all()


def test_ema_keeps_the_statistic_of_a_row_that_is_not_decoded() -> None:
    whole = make_view(3, slots=12, queries=12)
    state: dict[str, Tensor] = {}
    view = part(whole, 0, 10, torch.empty(1, 2, 0, dtype=F64), state)
    Ema().observe(view)
    after = part(whole, 10, 11, view.slots.stats[STAT], state)
    after.slots.positions = after.slots.positions.clone()
    after.slots.positions[..., 10] = -1
    after.query_positions = torch.tensor([[-1]])
    Ema().observe(after)
    assert torch.equal(after.slots.stats[STAT][..., :10], view.slots.stats[STAT])
