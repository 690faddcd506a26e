"""What text asks of vision, and budgets by the density of attention, against loops over every query and slot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from merge_views import make_view
from score_views import loop_weights, part_of_queries, together
from torch import Tensor

from keepkv.allocate import Density, FirstLayers, keep_mask
from keepkv.core.slots import LayerView
from keepkv.core.tokens import IMAGE, TEXT, Coming, Tokens
from keepkv.errors import BudgetError, KeepKVError
from keepkv.methods import apply, make_method
from keepkv.methods.base import Method
from keepkv.reduce.look_m import LookM
from keepkv.score import H2O, Ends, FastV, KeyDiff, SnapKV, TextFirst, VLCache

SLOTS = 14


def seen(view: LayerView, kinds: str) -> LayerView:
    """``view`` whose tokens are text ("t") or vision ("v")."""
    marks = torch.tensor([[IMAGE if x == "v" else TEXT for x in kinds]]).expand(len(view.seen), -1)
    at = torch.arange(len(kinds)).expand(len(view.seen), -1)
    return replace(view, tokens=Tokens.text(len(view.seen), 1).extended(at, Coming(kinds=marks)), prompt=True)


def row(seed: int, kinds: str, queries: int | None = None) -> LayerView:
    """One row, every token of it a query unless fewer are asked for."""
    made = make_view(seed, rows=1, groups=2, slots=len(kinds), queries=queries or len(kinds), dim=8, votes=False)
    stats = {name: torch.zeros_like(made.slots.log_votes) for name in ("mass", "post_vision")}
    return seen(replace(made, slots=made.slots.with_(stats=stats)), kinds)


def naive(view: LayerView, asked: list[int], part: float = 0.01) -> tuple[Tensor, float]:
    """Mass (H,S) of the queries at ``asked`` positions, and density, by loops."""
    attn, h = loop_weights(view)[0], view.slots.shape[1]
    positions = view.query_positions[0].tolist()
    chosen = [i for i, p in enumerate(positions) if p in asked]
    mass = attn[:, chosen].sum(1).view(h, -1, attn.shape[-1]).mean(1)
    large = every = 0
    for head in range(attn.shape[0]):
        for i in chosen:
            visible = attn[head, i][view.slots.positions[0, head // (attn.shape[0] // h)] <= positions[i]]
            large, every = large + int((visible >= part * visible.max()).sum()), every + len(visible)
    return mass, large / every


@pytest.mark.parametrize(("kinds", "asked"), [
    ("tttvvvvvvttttt", range(9, 14)), ("tvvvtvvvtttttt", range(8, 14)), ("tttttttttttttt", range(14)),
    ("ttttttttvvvvvv", [13]),
])  # fmt: skip
@pytest.mark.parametrize("part", [0.01, 0.3])
def test_vl_cache_is_the_attention_behind_the_last_picture(kinds: str, asked: list[int], part: float) -> None:
    view, score = row(1, kinds), VLCache(part)
    score.observe(view)
    mass, density = naive(view, [*asked], part)
    torch.testing.assert_close(score(view)[0].double(), mass, atol=1e-6, rtol=1e-5)
    assert float(score.density(view)) == pytest.approx(density)


@pytest.mark.parametrize("cut", [2, 5, 8, 11, 13])
def test_chunks_say_what_one_forward_says(cut: int) -> None:
    """A picture that comes later begins anew, and one at the end of a chunk is forgotten when text follows."""
    kinds = "ttvvvvttvvvttt"
    whole, score = row(2, kinds), VLCache()
    score.observe(whole)
    view = row(2, kinds)
    first = part_of_queries(view, 0, cut)
    score.observe(first)
    mass = torch.zeros_like(view.slots.log_votes)
    mass[..., :cut] = first.slots.stats["post_vision"]
    second = replace(part_of_queries(view, cut), state=first.state)
    second.slots = second.slots.with_(stats={"post_vision": mass})
    score.observe(second)
    torch.testing.assert_close(score(second), score(whole))
    assert float(score.density(second)) == pytest.approx(float(score.density(whole)))


def test_rows_of_a_batch_are_as_they_are_alone() -> None:
    rows, score = [row(3, "tttvvvvvvttttt"), row(4, "ttvvvttt")], VLCache()
    both = together(rows)
    marks = torch.full((2, SLOTS), TEXT)
    for i, kinds in enumerate(("tttvvvvvvttttt", "ttvvvttt")):
        marks[i, SLOTS - len(kinds) :] = torch.tensor([IMAGE if x == "v" else TEXT for x in kinds])
    known = Tokens.text(2, 1).extended(both.slots.positions[:, 0].long(), Coming(kinds=marks))
    both = replace(both, tokens=known, prompt=True)
    score.observe(both)
    for i, one in enumerate(rows):
        score.observe(one)
        torch.testing.assert_close(score(both)[i, :, -one.slots.shape[2] :], score(one)[0])
        assert float(score.density(both)[i]) == pytest.approx(float(score.density(one)))


def test_snapkv_over_the_whole_prompt_is_h2o() -> None:
    view = row(5, "t" * SLOTS)
    H2O().observe(view)
    snap = SnapKV(window=SLOTS, kernel=1)
    snap.observe(view)
    torch.testing.assert_close(snap(view) * SLOTS, H2O()(view), atol=1e-5, rtol=1e-5)
    mass, _ = naive(view, [*range(SLOTS)])
    torch.testing.assert_close(H2O()(view)[0].double(), mass, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [1, 5, 9, 13])
def test_ends_are_what_the_bench_calls_streaming_llm(budget: int) -> None:
    view = replace(row(6, "t" * SLOTS), budget=torch.tensor([budget]))
    keep = keep_mask(Ends(0.3)(view), torch.full((1, view.slots.shape[1]), budget), view)
    newest = max(1, int(0.3 * budget))
    assert {*keep[0, 0].nonzero()[:, 0].tolist()} == {*range(budget - newest), *range(SLOTS - newest, SLOTS)}


# --- layers ------------------------------------------------------------------------------------------------------


def across(allocate: Density, dense: list[float], budget: int, tokens: int = 50, pinned: int = 4) -> list[int]:
    tier = torch.ones(1, 2, tokens, dtype=torch.int8)
    tier[..., :pinned] = 2
    known = [{"density": torch.tensor([x], dtype=torch.float64)} for x in dense]
    scores = [torch.zeros(1, 2, tokens)] * len(dense)
    found = allocate.across(scores, [tier] * len(dense), [torch.tensor([budget])] * len(dense), known)
    assert all(bool((x == x[:, :1]).all()) for x in found)
    return [int(x[0, 0]) for x in found]


def test_layers_share_by_density() -> None:
    dense = [0.9, 0.3, 0.2, 0.1, 0.1]
    counts = across(Density(), dense, 10)
    assert sum(counts) == 50  # exact, whatever is clipped
    assert all(4 <= n <= 50 for n in counts) and counts == sorted(counts, reverse=True)
    free = across(Density(), [0.4, 0.3, 0.2, 0.1], 20, pinned=0)
    assert free == [32, 24, 16, 8]
    assert across(Density(), [0.25] * 4, 13) == [13] * 4 == across(Density(), [0.0] * 4, 13)
    assert across(Density(0.0), dense, 10) == [10] * 5
    mixed = across(Density(0.2), [0.4, 0.3, 0.2, 0.1], 20, pinned=0)
    assert mixed == [round(0.8 * 20 + 0.2 * x) for x in (32, 24, 16, 8)]
    assert across(Density(), [1.0, 0.0, 0.0], 30) == [50, 20, 20]  # one cannot take more than it holds


def test_the_first_layers_keep_everything() -> None:
    tier, budgets = torch.ones(1, 2, 40, dtype=torch.int8), [torch.tensor([22])] * 5
    found = FirstLayers(2).across([torch.zeros(1, 2, 40)] * 5, [tier] * 5, budgets)
    assert [int(x[0, 0]) for x in found] == [40, 40, 10, 10, 10]
    with pytest.raises(BudgetError, match="first 2 of 5 layers"):
        FirstLayers(2).across([torch.zeros(1, 2, 40)] * 5, [tier] * 5, [torch.tensor([15])] * 5)


def test_fastv_chooses_in_one_layer_for_all_later_ones() -> None:
    """Against the loops: text, and the vision with most attention in layer 1, mean over heads, the same everywhere."""
    kinds, layers, budget = "ttvvvvvvvvtttt", 4, 11
    method = make_method("fastv", {"whole": 2})
    views = []
    for layer in range(layers):
        view = replace(row(10 + layer, kinds), layer=layer, layers=layers)
        method.score.observe(view)
        views.append(view)
    mass = naive(views[1], [*range(SLOTS)])[0].sum(0)
    budgets = [torch.tensor([budget])] * layers
    kept = apply.compress(method, views, budgets)
    room = (layers * budget - 2 * SLOTS) // 2 - kinds.count("t")
    vision = [i for i, x in enumerate(kinds) if x == "v"]
    best = sorted(vision, key=lambda i: -float(mass[i]))[:room]
    wanted = sorted([*(i for i, x in enumerate(kinds) if x == "t"), *best])
    for layer, one in enumerate(kept):
        for head in range(one.slots.shape[1]):
            assert one.slots.positions[0, head].tolist() == ([*range(SLOTS)] if layer < 2 else wanted)


def test_pieces_that_do_not_fit_are_refused() -> None:
    with pytest.raises(KeepKVError, match="joint"):
        Method(FastV(), led_by=1)
    with pytest.raises(KeepKVError, match="density"):
        Method(KeyDiff(), Density())
    Method(TextFirst(VLCache()), Density())  # passed on


# --- merging -----------------------------------------------------------------------------------------------------


def test_merging_within_a_modality_leaves_the_other_alone() -> None:
    view = row(7, "tttvvvvvvttttt")
    text = torch.tensor([x == "t" for x in "tttvvvvvvttttt"])
    keep = text.expand(1, view.slots.shape[1], -1).clone()
    keep[..., 4] = True  # text, and one token of vision
    for within, changes in (("modality", False), ("all", True)):
        made = LookM("average", within)(view, keep, torch.zeros_like(view.slots.log_votes), H2O()).slots
        for head in range(made.shape[1]):
            kept = [int(x) for x in made.positions[0, head]]
            same = [bool((made.keys[0, head, i] == view.slots.keys[0, head, p]).all()) for i, p in enumerate(kept)]
            assert all(same[i] for i, p in enumerate(kept) if text[p]) or changes
            if within == "modality":
                others = view.slots.keys[0, head][~text].double().mean(0)
                torch.testing.assert_close(made.keys[0, head, kept.index(4)].double(), others, atol=1e-5, rtol=1e-5)
        moved = any(bool((made.keys[0, h, :3] != view.slots.keys[0, h, :3]).any()) for h in range(made.shape[1]))
        assert moved is changes
    whole = torch.ones_like(keep)
    made = LookM("average", "modality")(view, whole, torch.zeros_like(view.slots.log_votes), H2O()).slots
    assert torch.equal(made.keys, view.slots.keys) and torch.equal(made.values, view.slots.values)
