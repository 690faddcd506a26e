"""Slots that stay exact beside codes, through all that becomes of a cache: protected spans and merged slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from transformers import DynamicCache

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.methods import apply

LENGTHS, NEW = (60, 48), 20
SPANS = [[keepkv.Span(10, 16, "protect")], [keepkv.Span(20, 22, "protect"), keepkv.Span(30, 33, "protect")]]
EXACT: dict[str, Any] = {"exact_first": 2, "exact_last": 3, "exact_merged": 4, "exact_protected": True}


def prompt() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, zoo.VOCAB, (2, max(LENGTHS)), generator=torch.Generator().manual_seed(3))
    mask = torch.stack([torch.arange(max(LENGTHS)) >= max(LENGTHS) - n for n in LENGTHS]).long()
    return {"input_ids": ids, "attention_mask": mask}


def more(cache: keepkv.Cache, steps: int) -> None:
    """Decode ``steps`` tokens, the same in every row."""
    for i in range(steps):
        ids = torch.full((len(cache.seen), 1), 5 + i)
        with torch.no_grad():
            zoo.model("llama")(input_ids=ids, attention_mask=cache.attention_mask(1), **{CACHE: cache})


def check(cache: keepkv.Cache, rows: list[int], others: bool = True) -> None:
    """Protected slots of the first layer, whose keys hang on nothing before them, are those of a plain cache; of the
    others most are not."""
    plain, inputs = DynamicCache(config=zoo.model("llama").config), prompt()
    with torch.no_grad():
        zoo.model("llama")(**inputs, **{CACHE: plain})
    view, same, off = cache.compressible[0].store.view(), 0, 0
    for i, row in enumerate(rows):
        protected = {p for span in SPANS[row] for p in range(span.start, span.end)}
        padding = max(LENGTHS) - LENGTHS[row]
        for h in range(view.shape[1]):
            held = {int(p): s for s, p in enumerate(view.positions[i, h]) if p >= 0}
            assert protected <= held.keys()
            for place, s in held.items():
                if place >= LENGTHS[row]:
                    continue
                wanted = plain.layers[0].keys[row, h, padding + place]
                found = torch.allclose(view.keys[i, h, s], wanted, atol=1e-5)
                assert found or place not in protected, (row, h, place)
                same, off = same + found, off + (not found)
    assert off > same / 4 or not others


@pytest.mark.parametrize("layout", ["dense", "ragged"])
@pytest.mark.parametrize("codec", ["int4", "kivi"])
def test_protected_spans_stay_exact_through_all_of_it(layout: str, codec: str, tmp_path: Path) -> None:
    """Prefill, compressions while decoding, a copy, a file, a row that leaves and comes back."""
    model = zoo.model("llama")
    cache = keepkv.Cache(
        model, "keepkv", 28, store=layout, codec=codec, store_options=EXACT, spans=SPANS, when=keepkv.When(every=6),
        sinks=1, window=4,
    )  # fmt: skip
    with torch.no_grad():
        model(**prompt(), **{CACHE: cache})
    check(cache, [0, 1])
    more(cache, NEW)
    assert cache.report().compressions > 2 * len(cache.compressible) and cache.report().merged
    check(cache, [0, 1])
    cache.save(tmp_path / "held.safetensors")
    loaded = keepkv.Cache.load(tmp_path / "held.safetensors", model)
    for one in (twin := cache.copy(), loaded):
        for layer, like in zip(one.compressible, cache.compressible, strict=True):
            assert torch.equal(layer.store.view().keys, like.store.view().keys)
        more(one, 7)
        check(one, [0, 1])
    for layer, like in zip(twin.compressible, loaded.compressible, strict=True):
        assert torch.equal(layer.store.view().keys, like.store.view().keys)
    apart = loaded.split([0])
    check(apart, [0])
    check(loaded, [1])
    loaded.join(apart)
    check(loaded, [1, 0])
    more(loaded, 7)
    check(loaded, [1, 0])
    loaded.crop(-1)
    check(loaded, [1, 0])


@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_slots_are_seen_in_the_order_of_the_text(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores and merges find neighbours side by side, though exact slots lie apart from codes."""
    seen: list[torch.Tensor] = []
    score = apply.score

    def watched(method: Any, view: Any, *rest: Any) -> Any:
        found = score(method, view, *rest)
        seen.append(view.slots.positions)
        return found

    monkeypatch.setattr(apply, "score", watched)
    cache = keepkv.Cache(
        zoo.model("llama"), "keepkv", 20, store=layout, codec="int4", store_options=EXACT, spans=SPANS,
        when=keepkv.When(every=4), sinks=1, window=4,
    )  # fmt: skip
    with torch.no_grad():
        zoo.model("llama")(**prompt(), **{CACHE: cache})
    more(cache, 9)
    stored = cache.compressible[0].store.view().positions
    assert len(seen) > 2 and all(bool((x[..., 1:] >= x[..., :-1]).all()) for x in seen)
    assert bool((stored[..., 1:] < stored[..., :-1]).any())  # in memory they are not


def test_closing_gaps_writes_no_code_twice() -> None:
    """A second prompt that is padded leaves a gap in a row, which is closed before rows join."""
    made = [keepkv.Cache(zoo.model("llama"), "snapkv", 1.0, codec="kivi", sinks=1, window=4) for _ in range(2)]
    turn = {"input_ids": torch.full((2, 4), 7), "attention_mask": torch.ones(2, max(LENGTHS) + 4, dtype=torch.long)}
    turn["attention_mask"][:, : max(LENGTHS)] = prompt()["attention_mask"]
    turn["attention_mask"][1, -4:-2] = 0
    with torch.no_grad():
        for cache in made:
            zoo.model("llama")(**prompt(), **{CACHE: cache})
            zoo.model("llama")(**turn, **{CACHE: cache})
    assert bool(made[0].shared.positions.gaps)
    before = [layer.store.view() for layer in made[0].compressible]
    made[0].join(made[1])
    for layer, old in zip(made[0].compressible, before, strict=True):
        view = layer.store.view()
        for row in range(2):
            new, was = (x.positions[row, 0].tolist() for x in (view, old))
            codes = [p for p in was if 0 <= p < LENGTHS[1] - 32]
            assert len(codes) > 10
            for x, y in ((view.keys, old.keys), (view.values, old.values)):
                assert torch.equal(x[row, :, [new.index(p) for p in codes]], y[row, :, [was.index(p) for p in codes]])
