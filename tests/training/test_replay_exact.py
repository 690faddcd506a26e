"""A replay gives the logits of the rollout, whatever was evicted and when."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import ARCHITECTURES, cache, compresses, sampled
from replayed import cache_of, distance, dropping, rollout, step_by_step

import keepkv
from keepkv import training
from keepkv.training import NEVER

# One forward over the text is that far from decoding it with transformers' own cache: 2e-6 where norms are large.
TOLERANCE = {"gemma3": 1e-5, "gemma4": 1e-5}


@pytest.mark.parametrize(("arch", "method"), sampled(12, ARCHITECTURES, dropping()))
def test_replay_is_the_rollout(arch: str, method: Any) -> None:
    """Padded batch, GQA, prompts longer and shorter than the budget, every method on every architecture."""
    when = {"when": keepkv.When(every=3)} if compresses(method) else {}
    text, mask, scores, record = rollout(zoo.model(arch), cache(arch, method, 14, **when))
    assert bool(record.evicted) == compresses(method)
    assert distance(zoo.model(arch), text, mask, scores, record) <= TOLERANCE.get(arch, 3e-6)


@pytest.mark.parametrize("arch", ["llama", "gemma4", "gpt-neox"])
def test_replay_is_exact_where_numbers_are(arch: str) -> None:
    """In float64 what is left is the model's own rotary embedding, which is float32."""
    model = copy.deepcopy(zoo.model(arch)).double()
    made = rollout(model, cache_of(model, "adakv", when=keepkv.When(every=3)))
    assert made[3].evicted and distance(model, *made) <= 2e-7


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"when": keepkv.When()}, {}),
        ({"when": keepkv.When("deferred")}, {}),
        ({"when": keepkv.When("deferred", every=2)}, {}),
        ({"when": keepkv.When(None, every=4)}, {}),
        ({"when": keepkv.When(None, cap=24)}, {"prefill_chunk_size": 8}),
        ({"when": keepkv.When(every=3)}, {"prefill_chunk_size": 8}),
        ({"when": keepkv.When("deferred", every=3)}, {"prefill_chunk_size": 8}),
        ({"budget": 0.3, "when": keepkv.When(every=2)}, {}),
        ({"when": keepkv.When(every=2), "spans": keepkv.SpanPolicy([], prompt=True), "budget": 66}, {}),
        ({"when": keepkv.When(every=3), "store": "ragged"}, {}),
        ({"when": keepkv.When(every=3), "store": "static", "store_options": {"capacity": 96}}, {}),
    ],
    ids=str,
)
def test_replay_of_any_schedule(options: dict[str, Any], more: dict[str, Any]) -> None:
    model = zoo.model("llama")
    method = "g-kv" if options["when"].cap is None else "streaming-llm"
    made = rollout(model, cache_of(model, method, **options), **more)
    assert made[3].evicted and distance(model, *made) <= 2e-6


@settings(max_examples=8, deadline=None)
@given(
    method=st.sampled_from(["random", "g-kv", "tova", "adakv"]),
    length=st.integers(2, 30),
    budget=st.integers(8, 20),
    every=st.integers(1, 5),
)
def test_the_record_is_what_was_held(method: str, length: int, budget: int, every: int) -> None:
    """Lossless: the tokens that each query saw are those that its integers say, so what each is seen by is a run."""
    model, new = zoo.model("llama"), 7
    made = cache_of(model, method, budget, when=keepkv.When(every=every))
    recorder, held = step_by_step(model, made, length, new)
    record = recorder.take()
    for step, layers in enumerate(held):
        query = length + step
        for layer, positions in zip(made.compressible, layers, strict=True):
            seen = (record.of(layer.info.index)[0] > query) & (torch.arange(length + new) <= query)
            for head in range(seen.shape[0]):
                assert (
                    sorted(positions[0, head][positions[0, head] >= 0].tolist()) == seen[head].nonzero()[:, 0].tolist()
                )


def test_rows_follow_and_a_reset_starts_anew() -> None:
    model = zoo.model("llama")
    made = cache_of(model, when=keepkv.When(every=3))
    record = rollout(model, made)[3]
    recorder: Any = made.shared.recorder
    made.reorder_cache(torch.tensor([2, 0, 1]))
    assert torch.equal(recorder.take().evict_at, record.rows(torch.tensor([2, 0, 1])).evict_at)
    assert made.copy().shared.recorder is None
    made.reset()
    again = rollout(model, made)[3]
    assert torch.equal(again.evict_at, record.evict_at)


def test_a_record_says_what_it_weighs() -> None:
    model = zoo.model("llama")
    record = rollout(model, cache_of(model, when=keepkv.When(every=3)))[3]
    rows, heads, tokens = record.evict_at.shape
    assert (rows, heads, tokens) == (3, 6, 61 + 7) and record.evict_at.dtype == torch.int32
    assert record.nbytes == 4 * rows * heads * tokens and record.mask_bytes == rows * heads * tokens**2
    both = training.joined([record, training.Record(record.evict_at[:1, :, :40], record.heads)])
    assert both.evict_at.shape == (4, 6, 68) and bool((both.evict_at[3, :, 40:] == NEVER).all())
    assert f"{record.evicted} evictions" in repr(record)
