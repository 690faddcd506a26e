"""``keepkv.compressed``: nested, in threads and tasks, on wrapped models; everything is put back."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import zoo
from running import batch, generate, row
from transformers import DynamicCache

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.errors import CacheStateError

INPUTS = row(batch(), 0)


def run(model: Any, new: int = 3, **options: Any) -> torch.Tensor:
    out: torch.Tensor = model.generate(
        **INPUTS, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **options
    )
    return out


def methods(caches: list[keepkv.Cache]) -> list[str]:
    return [cache.settings.method.name for cache in caches if cache.report().compressed]


def fresh() -> Any:
    torch.manual_seed(0)
    return zoo.ZOO["llama"]().eval()


def state(model: Any) -> tuple[str, set[str]]:
    return model.config._attn_implementation, set(model.__dict__)


def test_nested_blocks_each_have_their_method() -> None:
    """Before, the outer block went on uncompressed after the inner one, and ended in an AttributeError."""
    model = fresh()
    before = state(model)
    with keepkv.compressed(model, "snapkv", 20, window=4, sinks=2) as outer:
        run(model)
        with keepkv.compressed(model, "knorm", 16) as inner:
            run(model)
        run(model)
        with pytest.raises(RuntimeError, match="body"), keepkv.compressed(model, "keydiff", 16) as third:
            run(model)
            raise RuntimeError("body")
        run(model)
    assert (methods(outer), methods(inner), methods(third)) == (["snapkv"] * 3, ["knorm"], ["keydiff"])
    assert state(model) == before
    run(model)
    assert len(outer) == 3


def test_blocks_of_two_threads_do_not_meet() -> None:
    """They overlap and end in the order they began; before, caches of both landed in one list, and one thread died."""
    model = fresh()
    before, steps = state(model), threading.Barrier(2, timeout=30)
    plain = run(model)
    found: dict[str, list[keepkv.Cache]] = {}

    def work(method: str, first: bool) -> None:
        if not first:
            steps.wait()
        with keepkv.compressed(model, method, 16) as found[method]:
            if first:
                steps.wait()
            steps.wait()
            for _ in range(3):
                run(model)
            if not first:
                steps.wait()
                run(model)
        if first:
            steps.wait()

    with ThreadPoolExecutor(2) as pool:
        for task in [pool.submit(work, "knorm", True), pool.submit(work, "keydiff", False)]:
            task.result(timeout=60)
    assert {name: methods(caches) for name, caches in found.items()} == {
        "knorm": ["knorm"] * 3,
        "keydiff": ["keydiff"] * 4,
    }
    assert state(model) == before
    assert torch.equal(run(model), plain)


def test_a_thread_without_a_block_falls_under_the_only_one() -> None:
    """As a streamer has it: ``generate`` runs in a thread of its own."""
    model = fresh()
    with ThreadPoolExecutor(1) as pool:
        with keepkv.compressed(model, "snapkv", 20, window=4, sinks=2), keepkv.compressed(model, "knorm", 16) as caches:
            pool.submit(run, model).result(timeout=60)
            assert methods(caches) == ["knorm"]
            opened = keepkv.compressed(model, "keydiff", 16)
            pool.submit(opened.__enter__).result(timeout=60)
            with ThreadPoolExecutor(1) as other, pytest.raises(CacheStateError, match="cannot be told"):
                other.submit(run, model).result(timeout=60)
            run(model)
            assert methods(caches) == ["knorm"] * 2
            pool.submit(opened.__exit__, None, None, None).result(timeout=60)
        assert model.config._attn_implementation == "sdpa"


def test_tasks_of_one_thread_do_not_meet() -> None:
    model = fresh()

    async def work(method: str) -> list[str]:
        with keepkv.compressed(model, method, 16) as caches:
            for _ in range(2):
                await asyncio.sleep(0)
                run(model)
        return methods(caches)

    async def both() -> list[list[str]]:
        return list(await asyncio.gather(work("knorm"), work("keydiff")))

    assert asyncio.run(both()) == [["knorm"] * 2, ["keydiff"] * 2]


def test_calls_that_bring_or_refuse_a_cache_keep_their_way() -> None:
    model = fresh()
    with keepkv.compressed(model, "knorm", 16) as caches:
        own = DynamicCache(config=model.config)
        run(model, **{CACHE: own})
        assert own.get_seq_length() and not caches
        run(model, use_cache=False)
        assert not caches


def test_what_stood_on_the_model_is_put_back() -> None:
    model = fresh()
    calls = []

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return type(model).generate(model, *args, **kwargs)

    model.generate = mine
    with keepkv.compressed(model, "knorm", 16) as caches:
        run(model)
    assert model.generate is mine and len(calls) == 1 and methods(caches) == ["knorm"]


def test_compiled_wrapper_is_compressed() -> None:
    model = fresh()
    with keepkv.compressed(torch.compile(model), "knorm", 16) as caches:
        run(torch.compile(model))
    assert methods(caches) == ["knorm"]


def test_generate_within_a_block_returns_what_a_cache_given_by_hand_returns() -> None:
    model = fresh()
    with keepkv.compressed(model, "knorm", 16):
        inside = generate(model, INPUTS, None)
    assert torch.equal(inside.scores_, generate(model, INPUTS, keepkv.Cache(model, "knorm", 16)).scores_)
