"""The same arithmetic is the same to the bit; what is summed in another order, to a few units of the last place.

float32, one device, deterministic algorithms. Docstrings say what each test showed with one line of the engine broken.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from running import batch, generate, plain
from torch import Tensor
from ulp import ulps

import keepkv
from keepkv.engine.versions import CACHE

SUMMED_OTHERWISE = 16.0  # ulp of the largest logit: other shapes are summed in another order; at most 6 were seen
BUDGET = 14
SMALL = {"window": 4, "sinks": 2}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("snapkv", SMALL), ("keepkv", SMALL), ("adakv", SMALL), ("keepkv2", SMALL), ("h2o", SMALL),
    ("random", {"sinks": 2}),
]  # fmt: skip
STORES: list[dict[str, Any]] = [
    {}, {"store": "ragged"}, {"store": "static", "store_options": {"capacity": 96}}, {"codec": "int8"},
]  # fmt: skip
CASES = [
    pytest.param(name, {**options, **store}, id="-".join((name, *map(str, store.values()))[:2]))
    for name, options in METHODS
    for store in STORES
    if not (name in ("adakv", "keepkv2") and store.get("store") == "ragged")  # it is theirs anyway
]
each = pytest.mark.parametrize(("name", "options"), CASES)


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def cache(name: str, options: dict[str, Any], budget: Any = BUDGET, **when: Any) -> keepkv.Cache:
    return keepkv.Cache(zoo.model("llama"), name, budget, when=keepkv.When(**{"every": 3, **when}), **options)


def fed(cache: keepkv.Cache, ids: Tensor) -> Tensor:
    """Logits (B,V) after ``ids`` (B,T), fed in one forward."""
    with torch.no_grad():
        return zoo.model("llama")(input_ids=ids, **{CACHE: cache}).logits[:, -1]


def decoded(cache: keepkv.Cache, steps: int = 7) -> Tensor:
    """Logits (steps,1,V) of tokens that are the same for every cache."""
    ids = torch.randint(3, zoo.VOCAB, (steps, 1), generator=torch.Generator().manual_seed(9))
    return torch.stack([fed(cache, one[None]) for one in ids])


def prompt(seed: int = 0, length: int = 40) -> Tensor:
    return torch.randint(3, zoo.VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


@each
def test_a_full_budget_is_the_plain_cache(name: str, options: dict[str, Any]) -> None:
    """To the bit, but for static buffers, whose empty columns are summed too; where a codec writes, the first token.

    Where ``Layer._holds_all`` is always false: 4 ulp off, in all cases.
    """
    out = generate(zoo.model("llama"), batch(), cache(name, options, 1.0)).scores_
    off = ulps(out, plain("llama").scores_)
    assert ulps(out[:, 0], plain("llama").scores_[:, 0]) == 0.0
    if "codec" not in options:
        assert off <= (SUMMED_OTHERWISE if options.get("store") == "static" else 0.0)


@each
def test_a_loaded_cache_goes_on(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """To the bit.

    Where a file's ``score_state`` is dropped: up to 4,000,000 ulp off, in the 14 cases whose scores remember. Where its
    ``decoded`` counts are: 2,000,000 ulp in all, as the next compression comes later.
    """
    mine = cache(name, options)
    fed(mine, prompt())
    decoded(mine, 2)
    mine.save(tmp_path / "cache")
    loaded = keepkv.Cache.load(tmp_path / "cache", zoo.model("llama"))
    assert ulps(decoded(loaded), decoded(mine)) == 0.0


@each
def test_a_copy_goes_on(name: str, options: dict[str, Any]) -> None:
    """To the bit, and what the copy decodes changes nothing.

    Where ``Layer.copy`` does not clone the store: 2,000,000 ulp off or an error, in all cases.
    """
    mine = cache(name, options)
    fed(mine, prompt())
    decoded(mine, 2)
    first = decoded(mine.copy())
    assert ulps(decoded(mine), first) == 0.0


@each
def test_joined_rows_go_on(name: str, options: dict[str, Any]) -> None:
    """As each alone, to what larger products sum otherwise.

    Where ``RowPositions.join`` swaps the two: 3,000,000 ulp off, in all cases.
    """
    alone = [cache(name, options) for _ in range(2)]
    for i, one in enumerate(alone):
        fed(one, prompt(i, 40 - 7 * i))
    joined, other = (x.copy() for x in alone)
    joined.join(other)
    both = _joined(joined)
    for i, one in enumerate(alone):
        assert ulps(both[:, i], decoded(one)[:, 0]) <= SUMMED_OTHERWISE


def _joined(cache: keepkv.Cache) -> Tensor:
    """Logits (steps,2,V) of the tokens that ``decoded`` feeds."""
    out = []
    for one in torch.randint(3, zoo.VOCAB, (7, 1), generator=torch.Generator().manual_seed(9)):
        mask = cache.attention_mask(1)
        feed = {"input_ids": one.expand(2, 1), "attention_mask": mask, "position_ids": mask.sum(-1, keepdim=True) - 1}
        with torch.no_grad():
            out.append(zoo.model("llama")(**feed, **{CACHE: cache}).logits[:, -1])
    return torch.stack(out)


@each
def test_chunks_of_a_prompt_are_the_prompt(name: str, options: dict[str, Any]) -> None:
    """Where its compression is deferred, to what larger products sum otherwise.

    Where ``Layer.compress_if_due`` runs what is pending before the next chunk: 3,000,000 ulp off, in all cases.
    """
    whole, chunked = (cache(name, options, prefill="deferred") for _ in range(2))
    fed(whole, prompt())
    for part in prompt().split(8, dim=1):
        fed(chunked, part)
    assert ulps(decoded(chunked), decoded(whole)) <= SUMMED_OTHERWISE


def test_units_of_the_last_place() -> None:
    one = torch.tensor([1.5, -3.0, 0.25])
    assert ulps(one, one.clone()) == 0.0
    assert ulps(one, torch.nextafter(one, torch.full((3,), 9.0))) == 1.0
    assert ulps(one, one + torch.tensor([0.0, 0.0, 4 * 2.0**-22])) == 4.0
    assert ulps(one, torch.tensor([1.5, torch.nan, 0.25])) == float("inf")
