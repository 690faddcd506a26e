"""Scores of vision against naive loops, on padded batches of grouped heads with slots missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from keepkv.allocate.select import keep_mask
from keepkv.core.rope import Rope
from keepkv.core.slots import EMPTY, LayerView, Slots
from keepkv.core.tokens import TEXT, VIDEO, Coming, Tokens
from keepkv.observe.vision import sight
from keepkv.score import EvenFrames, InfiniPotV, NewestFrames, TaR, TextFirst, VaN

H, D, ROWS, COLUMNS, STEPS, PREFIX = 2, 8, 3, 4, 9, 5
P = ROWS * COLUMNS
ROPE = Rope(torch.tensor([1.0, 0.3, 0.05, 0.01]), axis=torch.tensor([0, 1, 2, 0]))


def view(seed: int = 0, missing: float = 0.3, budget: int = 60, steps: int = STEPS, **changes: Any) -> LayerView:
    """Two rows of text and a video of M-RoPE positions; the second is shorter and padded. Older slots are missing."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [PREFIX + steps * P, PREFIX + (steps - 2) * P]
    size = max(lengths)
    positions = torch.full((2, size), EMPTY)
    kinds, places = torch.zeros(2, size, dtype=torch.int64), torch.zeros(2, size, 3, dtype=torch.int64)
    for row, n in enumerate(lengths):
        positions[row, -n:] = torch.arange(n)
        vision = torch.arange(n - PREFIX)
        t, cell = vision // P, vision % P
        places[row, -n : size - n + PREFIX] = torch.arange(PREFIX)[:, None]
        where = torch.stack((t + PREFIX, PREFIX + cell // COLUMNS, PREFIX + cell % COLUMNS), -1)
        kinds[row, size - n + PREFIX :], places[row, size - n + PREFIX :] = VIDEO, where
    tokens = Tokens.text(2, 3).extended(positions, Coming(places, kinds))
    wide = positions[:, None].expand(2, H, size).to(torch.int32).contiguous()
    keys, values = (torch.randn(2, H, size, D, generator=generator) for _ in range(2))
    keys = ROPE.rotate(keys, tokens.places(wide))
    held = Slots(keys, values, torch.zeros(2, H, size), wide)
    steps_of = tokens.of(wide)[..., -2]
    old = (wide >= PREFIX) & (steps_of < steps_of.amax((1, 2), keepdim=True) - 1)
    held = held.select(~(old & (torch.rand(2, H, size, generator=generator) < missing)))
    more = dict(rope=ROPE, tokens=tokens, budget=torch.full((2,), budget), layers=4)
    return LayerView(held, held.keys[:, :, :0], positions[:, :0], torch.tensor(lengths), 1.0, **{**more, **changes})


def naive_tar(v: LayerView, recent: int, rotated: bool) -> Tensor:
    """The double loop over past slots and recent steps."""
    slots, seen = v.slots, sight(v)
    out = torch.full(slots.positions.shape, float("-inf"), dtype=torch.float64)
    for b in range(2):
        for h in range(H):
            keys = {}
            for s in range(slots.shape[2]):
                if not seen.vision[b, h, s]:
                    continue
                k = slots.keys[b, h, s].double()
                if not rotated:
                    for pair in range(D // 2):
                        place = int(v.tokens.places(slots.positions)[b, h, s, ROPE.axis[pair]])  # type: ignore[union-attr]
                        angle = torch.tensor(-place * float(ROPE.inv_freq[pair]), dtype=torch.float64)
                        x, y = k[pair].clone(), k[pair + D // 2].clone()
                        k[pair] = x * angle.cos() - y * angle.sin()
                        k[pair + D // 2] = y * angle.cos() + x * angle.sin()
                keys[s] = (int(seen.steps[b, h, s]), int(seen.cells[b, h, s]), k / k.norm())
            newest = max(step for step, _, _ in keys.values())
            for s, (_, cell, k) in keys.items():
                same = [x for step, c, x in keys.values() if step > newest - recent and c == cell]
                out[b, h, s] = -sum(float(k @ x) for x in same) / len(same)
    return out


@pytest.mark.parametrize("space", ["unrotated", "rotated"])
def test_tar_is_the_double_loop(space: str) -> None:
    v = view()
    recent = int(0.45 * (60 - PREFIX) / P)
    assert recent == 2
    found = TaR(recent=0.45, space=space)(v)
    torch.testing.assert_close(found.double(), naive_tar(v, recent, space == "rotated"), atol=1e-5, rtol=1e-5)


def test_tar_knows_a_static_scene_and_what_is_new_in_it() -> None:
    v = view(missing=0.0)
    seen = sight(v)
    scene = torch.randn(H, P, D, generator=torch.Generator().manual_seed(1))
    keys = torch.stack([scene[h, seen.cells[:, h].clamp(min=0)] for h in range(H)], 1)
    novel = (seen.steps == 2) & (seen.cells == 7)
    keys[novel] = torch.randn(int(novel.sum()), D, generator=torch.Generator().manual_seed(2))
    turned = v.slots.with_(keys=ROPE.rotate(keys, v.key_places()))
    score = TaR()(LayerView(turned, *_rest(v)))
    past = seen.vision & ~seen.recent(1 / 6)
    assert torch.allclose(score[past & ~novel], torch.tensor(-1.0), atol=1e-5)
    assert (score.masked_fill(~past, -2).amax(-1) == score.masked_fill(~novel, -2).amax(-1)).all()
    scaled = LayerView(turned.with_(keys=turned.keys * 3), *_rest(v))
    assert torch.allclose(TaR()(scaled)[seen.vision], score[seen.vision], atol=1e-5)


def _rest(v: LayerView) -> tuple[Any, ...]:
    return (v.queries, v.query_positions, v.seen, v.scaling, v.state, None, None, v.rope, v.layer, v.layers, 0, None,
            {}, None, v.budget, v.tokens)  # fmt: skip


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_van_is_a_mean_over_neighbours_that_are_there(kernel: int) -> None:
    v = view()
    seen, found = sight(v), VaN(pool=kernel)(v)
    norms = v.slots.values.double().norm(dim=-1)
    for b in range(2):
        for h in range(H):
            at = {
                (int(seen.steps[b, h, s]), *divmod(int(seen.cells[b, h, s]), COLUMNS)): s
                for s in range(v.slots.shape[2]) if seen.vision[b, h, s]
            }  # fmt: skip
            for (step, row, column), s in at.items():
                near = range(-(kernel // 2), kernel // 2 + 1)
                held = [at.get((step, row + i, column + j)) for i in near for j in near if 0 <= column + j < COLUMNS]
                mean = torch.stack([norms[b, h, x] for x in held if x is not None]).mean()
                assert abs(float(found[b, h, s]) - float(mean)) < 1e-5
    flat = LayerView(v.slots.with_(values=torch.ones_like(v.slots.values)), *_rest(v))
    assert torch.allclose(VaN(pool=kernel)(flat)[seen.vision], torch.tensor(D**0.5), atol=1e-5)  # borders too


def test_kernels_by_depth_and_by_variation() -> None:
    v = view()
    for layer, kernel in enumerate((7, 5, 3, 1)):
        v.layer = layer
        assert torch.equal(VaN()(v), VaN(pool=kernel)(v))
    wide = VaN(pool="variation", thresholds=(9.0, 10.0, 11.0))(v)  # nothing varies as much: all are smooth
    assert torch.equal(wide, VaN(pool=7)(v))
    assert torch.equal(VaN(pool="variation", thresholds=(0.0, 0.0, 0.0))(v), VaN(pool=1)(v))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("recent", [0.25, 0.45])
def test_exactly_what_the_algorithm_says_survives(alpha: float, recent: float) -> None:
    """Text and C vision slots in each head: recent steps, the most distinctive of the past, the rest by VaN."""
    v, budget = view(), 60
    seen, score = sight(v), TextFirst(InfiniPotV(alpha=alpha, recent=recent, pool=3), recent)
    keep = keep_mask(score(v), torch.full((2, H), budget), v)
    count, room = max(1, int(recent * (budget - PREFIX) / P)), budget - PREFIX
    tar, van = TaR(recent)(v), VaN(pool=3)(v)
    for b in range(2):
        for h in range(H):
            kept = set(keep[b, h].nonzero()[:, 0].tolist())
            vision = seen.vision[b, h].nonzero()[:, 0].tolist()
            text = (v.slots.valid[b, h] & ~seen.vision[b, h]).nonzero()[:, 0].tolist()
            new = [s for s in vision if seen.steps[b, h, s] > seen.newest[b, 0, 0] - count]
            past = sorted((s for s in vision if s not in new), key=lambda s: -float(tar[b, h, s]))
            share = room - round((1 - alpha) * room)
            chosen = set(new) | set(past[: max(0, share - len(new))])
            rest = sorted((s for s in vision if s not in chosen), key=lambda s: -float(van[b, h, s]))
            assert kept == set(text) | chosen | set(rest[: room - len(chosen)])


def test_whole_frames() -> None:
    v, budget = view(missing=0.0), PREFIX + 4 * P
    v.budget = torch.full((2,), budget)
    seen = sight(v)
    for score, wanted in ((NewestFrames(), [[5, 6, 7, 8], [3, 4, 5, 6]]), (EvenFrames(), [[0, 4, 6, 8], [0, 2, 4, 6]])):
        keep = keep_mask(TextFirst(score, 0.25)(v), torch.full((2, H), budget), v) & seen.vision
        for b in range(2):
            assert seen.steps[b][keep[b]].unique().tolist() == wanted[b]


def test_text_alone_is_kept_by_age() -> None:
    v = view()
    v.tokens = None
    keep = keep_mask(TextFirst(InfiniPotV())(v), torch.full((2, H), 10), v)
    for b in range(2):
        assert v.slots.positions[b][keep[b]].view(H, -1).tolist() == [
            v.slots.positions[b, h, -10:].tolist() for h in range(H)
        ]
    assert int(sight(v).cells.max()) == -1 and TEXT == 0
