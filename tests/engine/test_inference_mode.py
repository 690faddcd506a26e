"""A cache that was filled in inference mode goes on outside of it, whatever is done next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matrix
import pytest
import torch
import zoo
from test_rollback import NAMES, OPTIONS, feed, ids

import keepkv
from keepkv.engine.versions import CACHE

STORES = ({}, {"store": "ragged"}, {"codec": "int8"}, {"store": "static", "store_options": {"capacity": 96}})


def read(name: str, inside: bool, arch: str = "llama", **options: Any) -> keepkv.Cache:
    options |= {} if name == "full" else {"when": keepkv.When("deferred", every=4)}
    cache = matrix.made(zoo.model(arch), name, None if name == "full" else 20, **options)
    with torch.inference_mode() if inside else torch.no_grad():
        zoo.model(arch)(ids(40), **{CACHE: cache})
        zoo.model(arch)(ids(1), **{CACHE: cache})
    return cache


@pytest.mark.parametrize("name", NAMES)
def test_generate_continues(name: str) -> None:
    """Without the guard: RuntimeError "Inplace update to inference tensor outside InferenceMode"."""
    said = []
    for inside in (False, True):
        cache, prompt = read(name, inside, **OPTIONS[name]), torch.cat((ids(40), ids(1), ids(5, seed=4)), dim=1)
        said.append(zoo.model("llama").generate(prompt, **{CACHE: cache}, max_new_tokens=6, do_sample=False))
    assert torch.equal(*said)


@pytest.mark.parametrize("store", STORES, ids=str)
@pytest.mark.parametrize(
    "act",
    [
        lambda cache: cache.crop(-1),
        lambda cache: cache.reorder_cache(torch.tensor([0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([0])),
        lambda cache: cache.compress(),
        lambda cache: cache.split([0]),
        lambda cache: cache.join(read("snapkv", False, **OPTIONS["snapkv"])),
        lambda cache: cache.copy().reset(),
    ],
    ids=["crop", "reorder", "repeat", "select", "compress", "split", "join", "reset"],
)
def test_rows_move_outside(act: Callable[[Any], Any], store: dict[str, Any]) -> None:
    cache = read("snapkv", True, **OPTIONS["snapkv"], **store)
    if not store or act.__code__.co_names[0] != "join":
        act(cache)
    rows = max(1, cache.batch_size)
    feed(cache, ids(1).expand(rows, 1), attention_mask=cache.attention_mask(1) if cache.seen.numel() else None)


def test_layers_that_transformers_keeps_too() -> None:
    cache = read("snapkv", True, "gemma3", **OPTIONS["snapkv"])
    cache.batch_repeat_interleave(2)
    feed(cache, ids(1).expand(2, 1), "gemma3")
    assert cache.report().seen == [42, 42]


@pytest.mark.parametrize(
    ("name", "options", "look"),
    [("kvzip", {}, keepkv.reread), ("keepkv2", {"rehearsed": True}, keepkv.rehearse)],
    ids=["reread", "rehearse"],
)
def test_text_is_looked_at_again(name: str, options: dict[str, Any], look: Callable[..., None]) -> None:
    """Read in inference mode, reread outside of it. Without the guard: the same RuntimeError."""
    kept = []
    for inside in (False, True):
        cache = matrix.made(zoo.model("llama"), name, 24, when=keepkv.When("deferred"), **options)
        with torch.inference_mode() if inside else torch.no_grad():
            zoo.model("llama")(ids(40), **{CACHE: cache})
        look(zoo.model("llama"), cache, ids(40))
        cache.compress()
        kept.append(cache.kept_positions(0))
    assert torch.equal(*kept)
