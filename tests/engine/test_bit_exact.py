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

SUMMED_OTHERWISE = 64.0  # ulp of the largest logit: products of other shapes, sums in another order, over three layers
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


def decoded(cache: keepkv.Cache, steps: int = 7, rows: int = 1) -> Tensor:
    """Logits (steps,B,V) of tokens that are the same for every cache."""
    ids = torch.randint(3, zoo.VOCAB, (steps, 1), generator=torch.Generator().manual_seed(9))
    return torch.stack([fed(cache, one.expand(rows, 1)) for one in ids])


def prompt(seed: int = 0, length: int = 40) -> Tensor:
    return torch.randint(3, zoo.VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


@each
def test_a_full_budget_is_the_plain_cache(name: str, options: dict[str, Any]) -> None:
    out = generate(zoo.model("llama"), batch(), cache(name, options, 1.0)).scores_
    print(
        "RES full",
        name,
        options.get("store"),
        options.get("codec"),
        ulps(out, plain("llama").scores_),
        ulps(out[:, 0], plain("llama").scores_[:, 0]),
    )


@each
def test_a_loaded_cache_goes_on(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    mine = cache(name, options)
    fed(mine, prompt())
    decoded(mine, 2)
    mine.save(tmp_path / "cache")
    loaded = keepkv.Cache.load(tmp_path / "cache", zoo.model("llama"))
    print("RES load", name, options.get("store"), options.get("codec"), ulps(decoded(loaded), decoded(mine)))


@each
def test_a_copy_goes_on(name: str, options: dict[str, Any]) -> None:
    mine = cache(name, options)
    fed(mine, prompt())
    decoded(mine, 2)
    twin = mine.copy()
    first = decoded(twin)
    print("RES copy", name, options.get("store"), options.get("codec"), ulps(decoded(mine), first))


@each
def test_joined_rows(name: str, options: dict[str, Any]) -> None:
    alone = [cache(name, options) for _ in range(2)]
    for i, one in enumerate(alone):
        fed(one, prompt(i))
    joined, other = (x.copy() for x in alone)
    joined.join(other)
    both = decoded(joined, rows=2)
    print(
        "RES join",
        name,
        options.get("store"),
        options.get("codec"),
        [ulps(both[:, i], decoded(one)[:, 0]) for i, one in enumerate(alone)],
    )


@each
def test_chunks(name: str, options: dict[str, Any]) -> None:
    whole, chunked = (cache(name, options, prefill="deferred") for _ in range(2))
    fed(whole, prompt())
    for part in prompt().split(8, dim=1):
        fed(chunked, part)
    print("RES chunk", name, options.get("store"), options.get("codec"), ulps(decoded(chunked), decoded(whole)))
