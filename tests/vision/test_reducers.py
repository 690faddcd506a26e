"""Reducers against plain loops in float64, and one budget for them and for methods on the cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seeing_tokens import Letters
from torch import Tensor

import keepkv
from helpers import vision_zoo as zoo
from keepkv.engine.versions import CACHE
from keepkv.errors import BudgetError, KeepKVError, UnsupportedInput, UnsupportedModel
from keepkv.vision.reduced import effective_entries, read_reduced, shares, vision_tokens
from keepkv.vision.reducers import REDUCERS, prumerge_plus, visionzip
from keepkv.vision.seeing import MARK, Seeing, read
from keepkv.vision.tower import observe


def drawn(seed: int, n: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    return made[0], torch.randn(n, generator=generator, dtype=torch.float64).exp().softmax(0), made[1]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


@pytest.mark.parametrize("count", [1, 2, 7, 16, 39])
def test_visionzip_is_its_loops(count: int) -> None:
    features, attention, keys = drawn(count)
    n, dominant = len(features), max(1, round(5.4 / 6.4 * count))
    first = sorted(range(n), key=lambda i: -float(attention[i]))[:dominant]
    rest = [i for i in range(n) if i not in first]
    left = count - dominant
    chosen = [rest[i * len(rest) // left] for i in range(left)]
    wanted = {i: features[i] for i in first}
    for c in chosen:
        near = [i for i in rest if i not in chosen and max(chosen, key=lambda t: cosine(keys[i], keys[t])) == c]
        wanted[c] = features[c] + (sum(features[i] for i in near) / len(near) if near else 0)
    found, index = visionzip(features, attention, keys, count)
    assert index.tolist() == sorted(wanted)
    torch.testing.assert_close(found, torch.stack([wanted[i] for i in sorted(wanted)]))


@pytest.mark.parametrize("count", [1, 3, 12, 38])
def test_prumerge_is_its_loops(count: int) -> None:
    features, attention, keys = drawn(100 + count)
    n, ordered = len(features), sorted(attention.tolist())

    def quartile(q: float) -> float:
        at = q * (n - 1)
        low = math.floor(at)
        return ordered[low] + (at - low) * (ordered[min(low + 1, n - 1)] - ordered[low])

    bound = quartile(0.75) + 1.5 * (quartile(0.75) - quartile(0.25))
    outliers = sorted((i for i in range(n) if attention[i] > bound), key=lambda i: -float(attention[i]))[:count]
    rest = [i for i in range(n) if i not in outliers]
    left = count - len(outliers)
    chosen = sorted([*outliers, *(rest[i * len(rest) // left] for i in range(left))])
    found, index = prumerge_plus(features, attention, keys, count)
    assert index.tolist() == chosen and (count == 38 or len(outliers) > 0)
    for row, i in zip(found, chosen, strict=True):
        near = sorted((j for j in range(n) if j != i), key=lambda j: -cosine(keys[i], keys[j]))[:32]
        torch.testing.assert_close(row, features[i] + sum(attention[j] * features[j] for j in near))


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 1000))
def test_as_many_as_asked_in_order(n: int, count: int, seed: int) -> None:
    features, attention, keys = drawn(seed, n)
    for reduce in REDUCERS.values():
        found, index = reduce(features, attention, keys, count)
        assert len(found) == len(index) == min(n, count) and bool((index.diff() > 0).all())
        if count >= n:
            assert torch.equal(found, features)
    parts = shares(count, n)
    assert sum(parts) == count and max(parts) - min(parts) <= 1


# --- one budget --------------------------------------------------------------------------------------------------


def test_budgets_count_what_is_cached() -> None:
    """The specification's example: at 1 % of 1,000 vision and 100 text tokens methods keep 11, reducers 110."""
    assert int(0.01 * 1100) == 11 and effective_entries(0.01, 1000, 100) == 110
    assert effective_entries(0.01, 1000, 100, layers=28, whole=2) == (2 * 1100 + 26 * 110) / 28
    assert effective_entries(1.0, 1000, 100, layers=28, whole=2) == 1100
    assert vision_tokens(0.2, 1000, 100) == 120 and vision_tokens(150, 1000, 100) == 50
    assert vision_tokens(5000, 1000, 100) == 1000 and vision_tokens("20%bytes", 1000, 100) == 120
    with pytest.raises(BudgetError, match="all stay"):
        vision_tokens(0.01, 1000, 100)
    with pytest.raises(KeepKVError, match="counts tokens"):
        vision_tokens("1MiB", 1000, 100)


# --- in a model --------------------------------------------------------------------------------------------------

SIZES = {"qwen2-vl": (24, 32), "qwen2-vl-pairs": (24, 32)}


def prompt(name: str, text: str = f"look {MARK} and {MARK * 2} now") -> tuple[Any, Seeing, list[int], Any]:
    model = zoo.model(name)
    seeing = Seeing(model, Letters(), SIZES.get(name))
    ids = seeing.encode(text)
    generator = torch.Generator().manual_seed(3)
    made = [torch.randint(0, 255, (n, 3, 20, 20), dtype=torch.uint8, generator=generator) for n in (1, 2)]
    return model, seeing, ids, seeing.seen(ids, made, torch.device("cpu"))


def ahead(model: Any, cache: Any, mask: Tensor, places: int) -> Tensor:
    """Logits (V,) of a token of text behind what was read."""
    ids = torch.tensor([[9]])
    with torch.no_grad():
        wide = torch.cat((mask, torch.ones_like(ids)), 1)
        at = torch.full_like(ids, places)
        return model(input_ids=ids, attention_mask=wide, position_ids=at, **{CACHE: cache}).logits[0, -1]


@pytest.mark.parametrize("name", [*SIZES, "llava"])
@pytest.mark.parametrize("reducer", REDUCERS)
def test_nothing_reduced_is_the_whole_prompt(name: str, reducer: str) -> None:
    model, seeing, ids, seen = prompt(name)
    caches = [keepkv.Cache(model, "full") for _ in range(2)]
    mask = read(model, caches[0], ids, seen, seeing)
    same, index = read_reduced(model, caches[1], ids, seen, seeing, reducer, int(seen.vision.sum()))
    assert index.tolist() == [*range(len(ids))] and torch.equal(mask, same)
    last = int(seen.places.max()) + 1
    found, wanted = ahead(model, caches[1], same, last), ahead(model, caches[0], mask, last)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*SIZES, "llava"])
@pytest.mark.parametrize("reducer", REDUCERS)
def test_what_is_left_is_what_is_cached(name: str, reducer: str) -> None:
    """As many entries as the budget says; with M-RoPE every token stands where it stood, else they are counted anew."""
    model, seeing, ids, seen = prompt(name)
    vision = int(seen.vision.sum())
    count = vision_tokens(0.7, vision, len(ids) - vision)
    cache = keepkv.Cache(model, "full")
    mask, index = read_reduced(model, cache, ids, seen, seeing, reducer, count)
    entries = int(0.7 * len(ids))
    assert len(index) == mask.shape[1] == entries
    assert {n for layer in cache.report().kept.values() for n in layer[0]} == {entries}
    at = cache.shared.positions.places(torch.arange(entries)[None])[0]
    wanted = seen.places[:, 0, index].T if "qwen" in name else torch.arange(entries)
    assert torch.equal(at.long(), wanted)
    text = (~seen.vision[0]).nonzero()[:, 0]
    assert bool(torch.isin(text, index).all())
    observed = observe(model, seeing, seen.pixels)
    assert len(observed) == 3 and all(len(x.attention) == len(x.features) == seeing.cells for x in observed)
    if name != "llava":  # the mean over all patches of what sums to one, four of which are a token
        assert all(float(x.attention.sum()) == pytest.approx(1 / 4) for x in observed)


def test_attention_in_the_tower_is_the_towers_own() -> None:
    """Against the weights that the tower itself returns."""
    model, seeing, _, seen = prompt("llava")
    tower = model.base_model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        weights = tower(seen.pixels, output_attentions=True).attentions[-1]  # it has one block
    tower.set_attn_implementation(before)
    for one, mine in zip(observe(model, seeing, seen.pixels), weights.mean(1), strict=True):
        torch.testing.assert_close(one.attention, mine[0, 1:], atol=1e-6, rtol=1e-4)


def test_what_cannot_be_reduced_is_refused() -> None:
    for name, why in (("internvl", "shuffled"), ("qwen2.5-vl", "windows")):
        model = zoo.model(name)
        seeing = Seeing(model, Letters(), (16, 24) if "qwen" in name else None)
        with pytest.raises(UnsupportedModel, match=why):
            observe(model, seeing, torch.zeros(1, 3, 16, 24))
    model, seeing, ids, seen = prompt("llava")
    with pytest.raises(KeepKVError, match="'full'"):
        read_reduced(model, keepkv.Cache(model, "snapkv", 0.5), ids, seen, seeing, "visionzip", 3)
    model, seeing, ids, seen = prompt("qwen2-vl", f"look {MARK} and {MARK * 2}")
    seeing.end = []
    ids = seeing.encode(f"look {MARK} and {MARK * 2}")
    seen = seeing.seen(ids, [torch.zeros(n, 3, 24, 32) for n in (1, 2)], torch.device("cpu"))
    with pytest.raises(UnsupportedInput, match="some text behind"):
        read_reduced(model, keepkv.Cache(model, "full"), ids, seen, seeing, "visionzip", 3)
