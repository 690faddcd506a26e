"""Selection: the set that is chosen, attention over it, and everything that a cache does beside."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import running
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.select import SELECTIONS, Select, choose, make_select
from keepkv.store.older import Older

SMALL: dict[str, Any] = {"sinks": 2, "window": 4, "measure": 1}
FREE = ("exact", "quest")  # of those that need no certain codec
PROMPT = (120, 70, 9)


def cache(name: str = "exact", selected: Any = 8, method: str = "full", budget: Any = None, **options: Any) -> Any:
    more = {**SMALL, **options.pop("select_options", {})}
    return keepkv.Cache(
        zoo.model(options.pop("arch", "llama")), method, budget, select=name, selected=selected, select_options=more,
        **options,
    )  # fmt: skip


def logits(made: Any, lengths: tuple[int, ...] = PROMPT, arch: str = "llama", **options: Any) -> Tensor:
    found: Tensor = running.generate(zoo.model(arch), running.batch(lengths), made, **options).scores_
    return found


# --- the set -------------------------------------------------------------------------------------------------------


@given(
    held=st.lists(st.integers(0, 40), min_size=4, max_size=4), selected=st.sampled_from([1, 5, 100, 0.2, 1.0]),
    sinks=st.integers(0, 4), window=st.integers(1, 8),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_set_has_sinks_window_and_the_best(held: list[int], selected: int | float, sinks: int, window: int) -> None:
    positions = torch.full((2, 2, 40), -1, dtype=torch.int32)
    for i, count in enumerate(held):
        positions[i // 2, i % 2, 40 - count :] = torch.randperm(50)[:count].sort().values.int()
    scores, seen = torch.randn(2, 2, 40), torch.tensor([50, 55])
    select = Select(selected=selected, sinks=sinks, window=window)
    columns, inside = choose(select, scores, positions, seen, False)
    for b in range(2):
        for h in range(2):
            at, place = columns[b, h][inside[b, h]], positions[b, h]
            assert len(set(at.tolist())) == len(at) and bool((place[at] >= 0).all())
            must = (place >= 0) & ((place < sinks) | (place >= seen[b] - window))
            assert set(must.nonzero()[:, 0].tolist()) <= set(at.tolist())
            free = ((place >= 0) & ~must).nonzero()[:, 0]
            n = min(selected, len(free)) if isinstance(selected, int) else -int(-len(free) * selected // 1)
            best = free[scores[b, h][free].topk(n).indices]
            assert set(at.tolist()) == set(best.tolist()) | set(must.nonzero()[:, 0].tolist())


def test_heads_that_belong_together_get_one_set() -> None:
    positions = torch.arange(30, dtype=torch.int32).expand(2, 3, 30)
    columns, inside = choose(Select(4), torch.randn(2, 3, 30), positions, torch.tensor([60, 60]), True)
    assert bool((columns == columns[:, :1]).all()) and bool((inside == inside[:, :1]).all())


# --- attention over it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["none", "int4", "kivi"])
@pytest.mark.parametrize("store", ["dense", "ragged"])
@pytest.mark.parametrize("name", FREE)
def test_everything_selected_is_attention_over_everything(name: str, store: str, codec: str) -> None:
    whole = keepkv.Cache(zoo.model("llama"), "full", store=store, codec=codec)
    assert torch.allclose(logits(cache(name, 1.0, store=store, codec=codec)), logits(whole), atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt-oss", "gemma4"])
def test_attention_is_that_over_the_chosen(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 softmax over the slots that ``choose`` names, those of attention sinks and all."""
    seen: list[tuple[Older, Tensor, Tensor]] = []
    take = Older.take

    def watched(self: Older, columns: Tensor, inside: Tensor) -> Any:
        seen.append((self, columns, inside))
        return take(self, columns, inside)

    monkeypatch.setattr(Older, "take", watched)
    made = cache("exact", 6, arch=arch)
    layers = made.compressible
    asked: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def listening(layer: Any) -> None:
        attend = layer.attend

        def listened(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            count = len(seen)
            out: Tensor = attend(module, query, *args, **kwargs)
            if len(seen) > count:
                asked.append((query, out, kwargs))
            return out

        layer.attend = listened

    for layer in layers:
        listening(layer)
    logits(made, arch=arch, new=3)
    assert len(asked) == len(seen) and asked
    for (older, columns, inside), (query, out, kwargs) in zip(seen, asked, strict=True):
        assert older.newest
        old = torch.cat([x for x in older.keys() if isinstance(x, Tensor)], 2).double()
        values = torch.cat([older.content.read(zone.tile(0, zone.length))[1] for zone in older.zones], 2).double()
        last = older.newest[0]
        for b in range(query.shape[0]):
            for head in range(query.shape[1]):
                h = head // (query.shape[1] // old.shape[1])
                at, there = columns[b, h][inside[b, h]], last.positions[b, h] >= 0
                keys = torch.cat((old[b, h, at], last.keys[b, h][there].double()))  # type: ignore[index]
                value = torch.cat((values[b, h, at], last.values[b, h][there].double()))  # type: ignore[index]
                u = keys @ query[b, head, 0].double() * (kwargs.get("scaling") or query.shape[-1] ** -0.5)
                if kwargs.get("softcap"):
                    u = (u / kwargs["softcap"]).tanh() * kwargs["softcap"]
                extra = [] if kwargs.get("s_aux") is None else [kwargs["s_aux"][head].double().view(1)]
                share = torch.cat((u, *extra)).softmax(0)[: len(u)]
                assert torch.allclose(out[b, 0, head].double(), share @ value, atol=1e-5)


def test_mass_kept_is_what_it_says_and_the_oracle_keeps_most() -> None:
    kept = {}
    for name in FREE:
        made = cache(name, 6)
        logits(made)
        receipt = made.report().selection
        assert receipt is not None and 0 < receipt.mass_kept <= 1 and receipt.measured == 5
        assert 0 < receipt.bytes_read < receipt.bytes_there
        assert 0 <= receipt.recall <= 1 and (receipt.recall == 1) == (name == "exact")
        assert receipt.name in str(made.report()) and made.report().to_dict()["selection"]["name"] == name
        kept[name] = receipt.mass_kept
    assert kept["exact"] >= kept["quest"]
    whole = cache("exact", 1.0)
    logits(whole)
    assert whole.report().selection.mass_kept == pytest.approx(1, abs=1e-6)
    assert whole.report().selection.recall == 1


def test_more_slots_keep_more() -> None:
    found = []
    for selected in (1, 4, 16, 64):
        made = cache("exact", selected)
        logits(made, new=2)
        found.append(made.report().selection.mass_kept)
    assert found == sorted(found)


def test_nothing_is_measured_where_nobody_asks() -> None:
    made = cache(select_options={"measure": 0})
    logits(made)
    assert made.report().selection.mass_kept is None and "not measured" in str(made.report())


def test_prefill_is_dense_and_few_slots_are_all_attended() -> None:
    made = cache(selected=500)
    assert torch.equal(logits(made), logits(keepkv.Cache(zoo.model("llama"), "full")))
    assert made.report().selection.measured == 0


def test_dense_layers_attend_to_everything() -> None:
    made = cache(select_options={"dense": (0, -1)})
    logits(made)
    layers = made.compressible
    assert [layer.tally.selections > 0 for layer in layers] == [
        i not in (0, len(layers) - 1) for i in range(len(layers))
    ]


# --- what a cache does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "budget", "codec"),
    [("full", None, "none"), ("snapkv", 0.7, "int4"), ("adakv", 0.7, "int4"), ("keepkv", 0.7, "none"),
     ("h2o", 0.7, "none"), ("adakv", 0.7, "none")],
)  # fmt: skip
@pytest.mark.parametrize("name", FREE)
def test_rows_are_as_if_alone(name: str, method: str, budget: Any, codec: str) -> None:
    lengths = PROMPT if codec == "none" else (120, 90)  # a codec leaves more of short rows as they are, in a batch less
    inputs = running.batch(lengths)
    both = logits(cache(name, 0.25, method, budget, codec=codec), lengths)
    for i in range(len(lengths)):
        alone = cache(name, 0.25, method, budget, codec=codec)
        found = running.generate(zoo.model("llama"), running.row(inputs, i), alone).scores_
        assert torch.allclose(found[0], both[i], atol=1e-4), i


@pytest.mark.parametrize("codec", ["none", "int4"])
def test_ragged_is_dense(codec: str) -> None:
    found = [logits(cache("exact", 8, "snapkv", 0.6, store=store, codec=codec)) for store in ("dense", "ragged")]
    assert torch.allclose(*found, atol=1e-5)


def _step(made: Any, token: int = 7) -> Tensor:
    model, rows = zoo.model("llama"), made.batch_size
    with torch.no_grad():
        found: Tensor = model(
            torch.full((rows, 1), token), attention_mask=made.attention_mask(1), **{CACHE: made}
        ).logits
    return found


@pytest.mark.parametrize("method", ["full", "snapkv"])
def test_saved_copied_cropped(method: str, tmp_path: Any) -> None:
    made = cache("exact", 0.25, method, None if method == "full" else 0.6, codec="int4")
    logits(made)
    made.save(tmp_path / "x.safetensors")
    loaded, twin = keepkv.Cache.load(tmp_path / "x.safetensors", zoo.model("llama")), made.copy()
    assert loaded.settings.select == made.settings.select
    first = _step(made)
    assert torch.equal(first, _step(loaded)) and torch.equal(first, _step(twin))
    second = _step(made)
    made.crop(-1)
    assert torch.equal(second, _step(made))


def test_beams() -> None:
    made = cache("exact", 1.0)
    whole = keepkv.Cache(zoo.model("llama"), "full")
    one, two = (
        running.generate(zoo.model("llama"), running.batch((90, 40)), x, num_beams=3).sequences for x in (made, whole)
    )
    assert torch.equal(one, two)


def test_rows_join_only_alike() -> None:
    one, other = cache(selected=8), cache(selected=9)
    logits(one, (50,))
    logits(other, (40,))
    with pytest.raises(keepkv.KeepKVError, match="selection"):
        one.join(other)


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "exactly"}, "exact"),
        ({"selected": 0}, "selected"),
        ({"selected": 1.5}, "selected"),
        ({"name": "codes"}, "give a codec"),
        ({"store": "static"}, "store='dense'"),
        ({"arch": "deepseek-v3"}, "latents"),
        ({"select_options": {"dense": ("a",)}}, "whole numbers"),
        ({"select_options": {"dense": (40,)}}, "no layer"),
        ({"select_options": {"windows": 3}}, "window"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(keepkv.KeepKVError, match=said):
        cache(**options)


def test_options_need_a_selection() -> None:
    with pytest.raises(keepkv.KeepKVError, match="give its name"):
        keepkv.Cache(zoo.model("llama"), "full", selected=8)
    assert make_select(Select(8), None, {}) == Select(8)


def test_one_of_your_own() -> None:
    @keepkv.register_select("test-first")
    @dataclasses.dataclass(frozen=True)
    class First(keepkv.Select):
        def scores(self, asked: Any) -> Tensor:
            return -asked.slots.positions.double()

    try:
        made = cache("test-first", 3)
        logits(made)
        assert made.report().selection.name == "test-first"
    finally:
        del SELECTIONS._factories["test-first"]
