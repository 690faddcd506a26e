"""Tokens that are taken back leave no trace: not in slots, not in what a score remembers, not in any count."""

from __future__ import annotations

import copy
from typing import Any

import matrix
import pytest
import torch
import zoo
from matrix import SMALL
from running import batch, generate
from transformers import PreTrainedModel

import keepkv
from keepkv.engine.layer import HELD
from keepkv.engine.versions import CACHE
from keepkv.errors import CacheStateError

NAMES = [info.name for info in keepkv.methods() if not info.name.startswith("test-")]
# A prompt that is kept would leave nothing to choose, and so would layers that keep everything.
FREE = SMALL | {"prompt": False, "whole": 0}
OPTIONS = {info.name: {k: v for k, v in FREE.items() if k in info.options} for info in keepkv.methods()}


def ids(length: int, seed: int = 1, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, zoo.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def feed(cache: Any, tokens: torch.Tensor, arch: str = "llama", **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return zoo.model(arch)(tokens, **{CACHE: cache}, **more).logits


def kept(cache: keepkv.Cache) -> list[set[tuple[int, ...]]]:
    """(row, head, position) of the slots of each layer."""
    found = []
    for layer in cache.compressible:
        positions = cache.kept_positions(layer.info.index)
        where = (positions >= 0).nonzero()
        found.append({(*at[:2], int(positions[tuple(at)])) for at in where.tolist()})
    return found


@pytest.mark.parametrize("name", matrix.sampled(2, NAMES))
def test_a_question_taken_back_changes_nothing(name: str) -> None:
    """Without the guard: other slots are kept by 15 of 22 methods, and logits off by up to 0.91 (adakv)."""
    budget = {} if name == "full" else {"budget": 20, "when": keepkv.When("deferred", every=4)}
    caches = [matrix.made(zoo.model("llama"), name, **budget, **OPTIONS[name]) for _ in range(2)]
    for i, cache in enumerate(caches):
        feed(cache, ids(40))
        if i:
            feed(cache, ids(9, seed=2))
            cache.crop(-9)
        logits = [feed(cache, ids(1, seed=3 + n)) for n in range(7)]
        caches[i] = (kept(cache), torch.stack(logits), cache.report().seen)  # type: ignore[call-overload]
    (slots, logits, seen), (other_slots, other_logits, other_seen) = caches  # type: ignore[misc]
    assert slots == other_slots and seen == other_seen
    torch.testing.assert_close(logits, other_logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", matrix.sampled(2, NAMES, first=1))
def test_rejected_drafts_change_nothing(name: str) -> None:
    """As assisted decoding does it. Without the guard: snapkv off by 1.1, adakv by .96, keepkv2 by .76."""
    if name == "full":
        return
    caches: list[Any] = []
    for drafts in (0, 3):
        cache = matrix.made(zoo.model("llama"), name, 20, when=keepkv.When("deferred", every=3), **OPTIONS[name])
        cache.activate_past_recording()
        logits = []
        for n, tokens in enumerate([ids(40), *(ids(1, seed=3 + i) for i in range(8))]):
            out = feed(cache, torch.cat((tokens, ids(drafts, seed=50 + n)), dim=1))
            logits.append(out[:, tokens.shape[1] - 1])
            cache.crop(-drafts)
        caches.append((kept(cache), torch.stack(logits)))
    assert caches[0][0] == caches[1][0]
    torch.testing.assert_close(caches[0][1], caches[1][1], atol=1e-5, rtol=1e-5)


def decisive(seed: int) -> PreTrainedModel:
    """A model whose most likely token is far ahead of the next."""
    model = copy.deepcopy(zoo.model("llama"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("name", matrix.sampled(2, [name for name in NAMES if name != "full"]))
def test_assisted_decoding_says_what_greedy_decoding_says(name: str) -> None:
    model, assistant = decisive(0), decisive(7)
    inputs = batch((60,))
    said = []
    for extra in ({}, {"assistant_model": assistant}):
        cache = matrix.made(model, name, 24, when=keepkv.When("deferred"), **OPTIONS[name])
        said.append(generate(model, inputs, cache, new=12, **extra).sequences)
    assert torch.equal(*said), f"{name}: {said}"


def test_more_than_the_score_can_forget_is_refused() -> None:
    cache = keepkv.Cache(zoo.model("llama"), "snapkv", 20, when=keepkv.When("deferred"), **SMALL)
    feed(cache, ids(40))
    feed(cache, ids(HELD + 6, seed=2))
    before = feed(cache.copy(), ids(1))
    with pytest.raises(CacheStateError, match=r"the score of method 'snapkv' has taken .* Copy the cache before"):
        cache.crop(-HELD - 6)
    assert torch.equal(feed(cache, ids(1)), before)
    blind = keepkv.Cache(zoo.model("llama"), "keydiff", 20, when=keepkv.When("deferred"), **SMALL)
    feed(blind, ids(40))
    feed(blind, ids(HELD + 6, seed=2))
    blind.crop(-HELD - 6)
    assert blind.report().seen == [40]


def test_crop_counts_tokens_not_padding() -> None:
    """Without the guard: 24 and 19 tokens are left of 24 and 20; a short row has −1."""
    cache = keepkv.Cache(zoo.model("llama"), "full")
    mask = torch.ones(2, 28, dtype=torch.long)
    mask[1, 20:25] = 0
    feed(cache, ids(20, rows=2), attention_mask=mask[:, :20])
    feed(cache, ids(7, rows=2), attention_mask=mask[:, :27])
    feed(cache, ids(1, rows=2), attention_mask=mask)
    cache.crop(-4)
    assert cache.report().seen == mask[:, :24].sum(-1).tolist() == [24, 20]
    cache.crop(-24)
    assert cache.report().seen == [] or cache.seen.tolist() == [0, 0]


def test_a_crop_that_one_layer_refuses_changes_none() -> None:
    """Without the guard: the full layer is cut, then the sliding one raises: lengths 38 and 40."""
    cache = keepkv.Cache(zoo.model("gemma3"), "full")
    feed(cache, ids(40), "gemma3")
    expected = feed(cache.copy(), ids(1), "gemma3")
    with pytest.raises(CacheStateError, match=r"crop\(-2\): a DynamicSlidingWindowLayer cannot be cropped"):
        cache.crop(-2)
    assert {layer.get_seq_length() for layer in cache.layers} == {40}
    assert torch.equal(feed(cache, ids(1), "gemma3"), expected)


def test_decoded_tokens_that_are_taken_back_are_not_counted() -> None:
    """Without the guard: a prompt that is taken back counts as decoded, and the next compression comes late."""
    seen = []
    for detour in (False, True):
        cache = keepkv.Cache(zoo.model("llama"), "keydiff", 20, when=keepkv.When(None, every=6), **SMALL)
        feed(cache, ids(30))
        for n in range(4):
            feed(cache, ids(1, seed=n))
        if detour:
            feed(cache, ids(10, seed=9))
            cache.crop(-10)
        for n in range(3):
            feed(cache, ids(1, seed=n))
        seen.append((cache.report().compressions, cache.report().kept))
    assert seen[0] == seen[1] and seen[0][0] > 0


def test_a_crop_behind_what_a_window_recorded_is_refused() -> None:
    """Without the guard: 3 keys are left where the window needs 15, and the next forward fails in torch."""
    cache = keepkv.Cache(zoo.model("gemma3"), "full")
    feed(cache, ids(30), "gemma3")
    cache.activate_past_recording()
    feed(cache, ids(1, seed=2), "gemma3")
    expected = feed(cache.copy(), ids(1), "gemma3")
    with pytest.raises(CacheStateError, match="of its window of 15 would be left"):
        cache.crop(-5)
    assert torch.equal(feed(cache, ids(1), "gemma3"), expected)


def test_a_reset_cache_records_as_it_did() -> None:
    cache = keepkv.Cache(zoo.model("gemma3"), "snapkv", 14, **SMALL)
    cache.activate_past_recording()
    cache.reset()
    assert all(layer.progress.record_past for layer in cache.compressible)
    assert all(layer.record_past for layer in cache.layers if layer.is_sliding)


def test_a_verification_ends_the_prompt_as_a_decoded_token_does() -> None:
    """Without the guard: all that is generated counts as prompt, and logits are off by 1.06."""
    spans = [keepkv.Span(1, 3, "protect"), keepkv.Span(4, 7, "fair")]
    policy, found = keepkv.SpanPolicy(spans, on_overflow="grow"), []
    for drafts in (0, 1):
        cache = keepkv.Cache(zoo.model("llama"), "knorm", 9, spans=policy, when=keepkv.When(every=2), **SMALL)
        cache.activate_past_recording()
        feed(cache, ids(12))
        logits = []
        for n in range(6):
            logits.append(feed(cache, torch.cat((ids(1, seed=n), ids(drafts, seed=40)), dim=1))[:, :1])
            cache.crop(-drafts)
        found.append(torch.stack(logits))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_padding_is_not_counted_as_decoded() -> None:
    """Without the guard: the short row is compressed a token earlier than alone."""
    kept_rows = []
    for padded in (False, True):
        cache = keepkv.Cache(zoo.model("llama"), "h2o", 8, when=keepkv.When(every=2), **SMALL)
        cache.activate_past_recording()
        rows = 1 + padded
        mask = torch.ones(rows, 30, dtype=torch.long)
        mask[1:, :] = 1
        feed(cache, ids(20).expand(rows, 20))
        done = 20
        for n, tokens in enumerate((1, 2, 1, 1)):
            new = ids(2 if padded and tokens == 1 else tokens, seed=n).expand(rows, -1)
            if padded and tokens == 1:
                mask[0, done] = 0
            done += new.shape[1]
            mine = ids(tokens, seed=n)
            new = torch.cat((new[:, : new.shape[1] - tokens], mine.expand(rows, -1)), dim=1)
            seen = mask[:, :done]
            feed(cache, new, attention_mask=seen, position_ids=(seen.cumsum(-1) - 1)[:, -new.shape[1] :].clamp_min(0))
        kept_rows.append({(h, p) for r, h, p in kept(cache)[0] if r == 0})
    assert kept_rows[0] == kept_rows[1]
