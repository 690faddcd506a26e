"""Restore slots: what a question sees is the kept slots and theirs; nothing of the model changes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import zoo
from running import batch
from torch import Tensor

import keepkv
from keepkv.calibrate import Exchange, restore
from keepkv.core.calibration import Calibration
from keepkv.engine.fingerprint import fingerprint
from keepkv.engine.passes.reread import feed
from keepkv.engine.passes.restore_slots import DOWN, EMBEDDINGS, KIND, UP, adapted, linear_maps
from keepkv.engine.versions import CACHE
from keepkv.errors import CacheStateError, CalibrationError, KeepKVError, UnsupportedInput
from keepkv.training import replay

SLOTS, BUDGET = 3, 12
DEFERRED = keepkv.When("deferred")
NAMES = ("llama", "qwen3", "gpt-oss")


def learned(name: str) -> dict[int, dict[str, Tensor]]:
    """Made-up embeddings and adapters that change much."""
    model, generator = zoo.model(name), torch.Generator().manual_seed(1)
    tensors: dict[int, dict[str, Tensor]] = {}
    for index, maps in linear_maps(model).items():
        held = tensors.setdefault(index, {})
        for linear, module in maps.items():
            held[DOWN + linear] = torch.randn(2, module.in_features, generator=generator) / module.in_features**0.5
            held[UP + linear] = torch.randn(module.out_features, 2, generator=generator) * 0.3
    tensors[min(tensors)][EMBEDDINGS] = torch.randn(SLOTS, 64, generator=generator)
    return tensors


def calibration(name: str) -> Calibration:
    return Calibration(KIND, learned(name), fingerprint(zoo.model(name)), {})


def read(name: str, lengths: tuple[int, ...] = (40,), method: str = "snapkv", **options: Any) -> tuple[Any, Any]:
    inputs = batch(lengths)
    cache = keepkv.Cache(zoo.model(name), method, BUDGET, **{"when": DEFERRED, "window": SLOTS, **options})
    with torch.no_grad():
        places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        zoo.model(name)(**inputs, position_ids=places, **{CACHE: cache})
    return cache, inputs


def fed(name: str, cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return feed(zoo.model(name), cache, ids, mask)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_compression_a_question_sees_text_and_restore_tokens(name: str) -> None:
    """Against one plain forward over text, restore tokens and question."""
    cache, inputs = read(name)
    mask = keepkv.restore_slots(zoo.model(name), cache, calibration(name))
    asked = torch.tensor([[5, 6, 7]])
    found = fed(name, cache, asked, mask)
    whole = torch.cat((inputs["input_ids"], torch.zeros(1, SLOTS, dtype=torch.long), asked), 1)
    with torch.no_grad(), adapted(zoo.model(name), learned(name), slice(40, 40 + SLOTS)):
        plain = zoo.model(name)(input_ids=whole, use_cache=False).logits[:, -1]
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=0)
    with torch.no_grad():
        assert not torch.allclose(zoo.model(name)(input_ids=whole, use_cache=False).logits[:, -1], plain, atol=1e-2)


@pytest.mark.parametrize("method", ["keydiff", "tova", "expected-attention"])
def test_what_is_trained_is_what_a_cache_does(method: str) -> None:
    """The forward with gradients against a cache that reads, restores, compresses and is asked."""
    model, asked = zoo.model("llama"), [5, 6, 7, 8]
    cache, inputs = read("llama", method=method)
    mask = keepkv.restore_slots(model, cache, calibration("llama"))
    cache.compress()
    assert int(cache.compressible[0].store.lengths.max()) < 43
    found = fed("llama", cache, torch.tensor([asked]), mask)
    lesson = restore.read(model, inputs["input_ids"], [asked], method, SLOTS)
    stays = restore.kept(model, lesson, BUDGET, learned("llama"), len(asked))
    ids = torch.cat((lesson.text, torch.zeros(1, SLOTS, dtype=torch.long), torch.tensor([asked])), 1)
    with torch.no_grad(), adapted(model, learned("llama"), slice(40, 43)):
        own = replay(model, ids, None, stays)[:, -1]
    torch.testing.assert_close(found, own, atol=2e-5, rtol=0)


def test_a_row_in_a_padded_batch_is_the_row_alone() -> None:
    asked = torch.tensor([[5, 6, 7]])
    cache, inputs = read("llama", (40, 23))
    mask = keepkv.restore_slots(zoo.model("llama"), cache, calibration("llama"), inputs["attention_mask"])
    cache.compress()
    together = fed("llama", cache, asked.expand(2, -1), mask)
    for i, length in enumerate((40, 23)):
        one = keepkv.Cache(zoo.model("llama"), "snapkv", BUDGET, when=DEFERRED, window=SLOTS)
        ids = inputs["input_ids"][i : i + 1, -length:]
        feed(zoo.model("llama"), one, ids, ids[:, :0])
        mask = keepkv.restore_slots(zoo.model("llama"), one, calibration("llama"))
        one.compress()
        torch.testing.assert_close(fed("llama", one, asked, mask)[0], together[i], atol=2e-5, rtol=0)


def test_gradients_reach_all_that_is_learned() -> None:
    tensors = {i: {n: x.requires_grad_() for n, x in held.items()} for i, held in learned("llama").items()}
    _, inputs = read("llama")
    asked = Exchange([5, 6], [7, 8])
    lesson = restore.read(zoo.model("llama"), inputs["input_ids"], [asked], "keydiff", SLOTS)
    restore.divergence(zoo.model("llama"), lesson, asked, BUDGET, tensors).backward()
    last = max(tensors)
    for index, held in tensors.items():
        for name, x in held.items():
            beyond = index == last and not any(part in name for part in ("k_proj", "v_proj"))
            assert x.grad is None or beyond == (float(x.grad.abs().sum()) == 0), (index, name)


def test_the_model_is_as_it_was_and_other_threads_do_not_see_the_adapters() -> None:
    model, ids = zoo.model("llama"), batch((20,))["input_ids"]
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        found: list[Tensor] = []

        def other() -> None:
            with torch.no_grad():
                found.append(model(input_ids=ids, use_cache=False).logits)

        with adapted(model, learned("llama"), slice(0, SLOTS)):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            assert not torch.equal(model(input_ids=ids, use_cache=False).logits, before)
        assert torch.equal(found[0], before)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


def test_what_cannot_be_restored_is_refused() -> None:
    model, good = zoo.model("llama"), calibration("llama")
    cache, inputs = read("llama", window=SLOTS - 1)
    with pytest.raises(KeepKVError, match="give window=3 or more"):
        keepkv.restore_slots(model, cache, good)
    cache, inputs = read("llama")
    with pytest.raises(UnsupportedInput, match="a mask"):
        keepkv.restore_slots(model, cache, good, inputs["attention_mask"][:, 1:])
    with pytest.raises(CalibrationError, match="of kind 'restore'"):
        keepkv.restore_slots(model, cache, Calibration("gates", good.tensors, good.fingerprint, {}))
    with pytest.raises(CalibrationError, match="another model"):
        keepkv.restore_slots(zoo.model("qwen3"), cache, good)
    with pytest.raises(CalibrationError, match="restore_embeddings"):
        keepkv.restore_slots(model, cache, Calibration(KIND, {0: {}}, good.fingerprint, {}))
    assert cache.get_seq_length() == 40
    cache.compress()
    with pytest.raises(CacheStateError, match="compressed already"):
        keepkv.restore_slots(model, cache, good)
    with pytest.raises(CacheStateError, match="has read nothing yet"):
        keepkv.restore_slots(model, keepkv.Cache(model, "snapkv", 9, window=SLOTS, when=DEFERRED), good)
