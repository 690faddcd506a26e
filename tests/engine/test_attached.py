"""A model gets back its attention when its last cache goes, never while it works; threads share a model."""

from __future__ import annotations

import copy
import gc
import pickle
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
from keepkv.errors import CacheStateError, KeepKVError, UnsupportedModel

SMALL: dict[str, Any] = {"window": 4, "sinks": 2}


def fresh(implementation: str = "sdpa", name: str = "llama") -> Any:
    torch.manual_seed(0)
    model = zoo.ZOO[name]().eval()
    model.set_attn_implementation(implementation)
    return model


def state(model: Any) -> tuple[Any, ...]:
    """What a cache changes of a model."""
    hooks = [(len(x._forward_hooks), len(x._forward_pre_hooks)) for x in model.modules()]
    return model.config.get_text_config()._attn_implementation, set(model.__dict__), hooks


def made(model: Any, method: str = "snapkv", **options: Any) -> keepkv.Cache:
    return keepkv.Cache(model, method, 14, **{**SMALL, **options})


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2-vl"])
def test_the_last_cache_restores_what_was(name: str, implementation: str) -> None:
    model = fresh(implementation, name)
    before = state(model)
    caches = [made(model), made(model)]
    generate(model, row(batch(), 0), caches[0])
    caches.append(caches[0].copy())
    caches.append(copy.deepcopy(caches[0]))
    while caches:
        assert model.config.get_text_config()._attn_implementation == "keepkv"
        caches.pop(0)
    assert state(model) == before
    again = made(model)
    assert generate(model, row(batch(), 0), again).sequences.shape[1] == 67
    del again
    assert state(model) == before


def test_rows_that_were_split_off_hold_the_model() -> None:
    model = fresh()
    cache = made(model)
    generate(model, batch(), cache)
    part = cache.split([1])
    del cache
    assert model.config._attn_implementation == "keepkv" and repr(part)
    del part
    assert model.config._attn_implementation == "sdpa"


def test_a_cache_that_is_refused_leaves_the_model_as_it_was() -> None:
    model = fresh("eager")
    before = state(model)
    with pytest.raises(KeepKVError):
        keepkv.Cache(model, "expected-attention", 14, statistics="stored")
    gc.collect()
    assert state(model) == before


def test_nothing_is_switched_under_a_forward() -> None:
    """A cache that goes while the model reads with another one, as the garbage collector may have it: the layers behind
    would get the mask of an attention that they no longer have."""
    model = fresh("eager")
    inputs = row(batch(), 0)
    plain = model(**inputs, **{CACHE: DynamicCache(config=model.config)}).logits
    held, seen = [made(model)], []

    def drop(*_: Any) -> None:
        held.clear()
        seen.append(model.config._attn_implementation)

    hook = model.model.layers[0].register_forward_hook(drop)
    found = model(**inputs, **{CACHE: DynamicCache(config=model.config)}).logits
    hook.remove()
    assert seen == ["keepkv"] and model.config._attn_implementation == "eager"
    assert torch.allclose(found, plain, atol=1e-5)


def test_a_forward_that_fails_is_over() -> None:
    model = fresh()
    cache = made(model)
    with pytest.raises(TypeError):
        model(input_ids=batch()["input_ids"], nonsense=object(), labels="no")
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch())
    with pytest.raises(ZeroDivisionError):
        generate(model, batch(), cache)
    hook.remove()
    del cache
    gc.collect()  # the exceptions' frames held it
    assert model.config._attn_implementation == "sdpa"


def test_restore_on_request() -> None:
    model = fresh("eager")
    before = state(model)
    keepkv.restore(model)  # has none: nothing happens
    cache = made(model)
    keepkv.restore(model)
    assert state(model) == before
    with pytest.raises(UnsupportedModel):
        generate(model, row(batch(), 0), cache)
    other = made(model)
    generate(model, row(batch(), 0), cache)
    assert cache.report().compressed and other.seen.tolist() == []
    with keepkv.compressed(model, "knorm", 14), pytest.raises(CacheStateError, match=r"keepkv\.compressed block"):
        keepkv.restore(model)
    del cache, other
    assert state(model) == before


def test_a_cache_made_inside_a_block_holds_the_model_after_it() -> None:
    model = fresh("eager")
    before = state(model)
    with keepkv.compressed(model, "knorm", 14) as caches:
        generate(model, row(batch(), 0), None)
        own = made(model)
    assert len(caches) == 1 and model.config._attn_implementation == "keepkv"
    generate(model, row(batch(), 0), own)
    del own
    assert state(model) == before


def test_copies_and_pickles() -> None:
    model = fresh("eager")
    before = state(model)
    cache = made(model)
    generate(model, row(batch(), 0), cache)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    read = pickle.loads(pickle.dumps(cache))
    assert repr(read) == repr(cache)
    del cache
    assert state(model) == before
    for twin in twins:
        assert twin.config._attn_implementation == "keepkv"
        held = made(twin)
        generate(twin, row(batch(), 0), held)
        del held
        assert (state(twin)[0], state(twin)[2]) == (before[0], before[2])
    keepkv.restore(copy.deepcopy(model))


def test_threads_with_caches_of_their_own() -> None:
    """Two at a time on one model answer as each does alone; the model is restored behind them."""
    model = fresh()
    before = state(model)
    jobs = [("snapkv", 0), ("keydiff", 1), ("snapkv", 1), ("knorm", 0)] * 3

    def work(job: tuple[str, int]) -> torch.Tensor:
        method, which = job
        cache = keepkv.Cache(model, method, 14, window=4, sinks=2)
        out: torch.Tensor = generate(model, row(batch(), which), cache, new=8).sequences
        assert cache.report().compressed
        return out

    alone = [work(job) for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(work, jobs, timeout=120))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    gc.collect()
    assert state(model) == before


def test_the_last_cache_may_go_while_another_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the guard its attention came back in the middle: "layers do not use the attention interface"."""
    model = fresh()
    before, last = state(model), [keepkv.Cache(model, "knorm", 14)]
    inner = keepkv.engine.model.check_forward

    def goes(*args: Any) -> None:
        last.clear()
        gc.collect()
        assert model.config._attn_implementation == "keepkv"
        inner(*args)

    monkeypatch.setattr("keepkv.engine.model.check_forward", goes)
    cache = keepkv.Cache(model, "knorm", 14)
    assert generate(model, row(batch(), 0), cache, new=1).sequences.shape[1] > 1
    del cache
    gc.collect()
    assert state(model) == before


def test_threads_with_plain_caches_beside_caches_that_come_and_go() -> None:
    """The switches fall between their forwards, not into them."""
    model = fresh()
    inputs, over, failures = row(batch(), 0), threading.Event(), []

    def plain() -> torch.Tensor:
        out: torch.Tensor = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
        return out

    expected = plain()

    def come_and_go() -> None:
        try:
            while not over.is_set():
                generate(model, row(batch(), 1), keepkv.Cache(model, "knorm", 14), new=1)
        except Exception as error:  # told below, in the thread of the test
            failures.append(error)

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        found = [plain() for _ in range(20)]
    finally:
        over.set()
        other.join(timeout=60)
    assert not failures, failures
    assert all(torch.equal(one, expected) for one in found)
