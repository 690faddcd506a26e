"""The three faults of the released training code of arXiv 2512.00504, each put into our replay: it must show."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import zoo
from replayed import cache_of, distance, rollout

import keepkv
from keepkv.training import NEVER, Record, feed

EVERY, BUDGET = 3, 14
SHOWS = 1e-2  # of a logit; a right replay is 2e-6 from the rollout at most


@pytest.fixture(scope="module")
def made() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Record]]:
    model = zoo.model("llama")
    text, mask, scores, record = rollout(model, cache_of(model, "g-kv", BUDGET, when=keepkv.When(every=EVERY)), new=12)
    assert distance(model, text, mask, scores, record) <= 2e-6
    yield text, mask, scores, record


def test_a_record_taken_before_the_compression(made: tuple[torch.Tensor, ...]) -> None:
    """Each token then leaves one interval late."""
    text, mask, scores, record = made
    late = torch.where(record.evict_at == NEVER, record.evict_at, record.evict_at + EVERY)
    assert distance(zoo.model("llama"), text, mask, scores, Record(late, record.heads)) > SHOWS


def test_one_layers_mask_for_all(made: tuple[torch.Tensor, ...]) -> None:
    text, mask, scores, record = made
    last = record.of(max(record.heads)).repeat(1, len(record.heads), 1)
    assert distance(zoo.model("llama"), text, mask, scores, Record(last, record.heads)) > SHOWS


def test_an_interval_that_is_not_passed_on(made: tuple[torch.Tensor, ...]) -> None:
    """The default of 128 stands for what was asked: nothing is evicted behind the prompt."""
    (text, mask, scores, record), model = made, zoo.model("llama")
    right = feed(model, cache_of(model, "g-kv", BUDGET, when=keepkv.When(every=EVERY)), text, mask, 61)
    wrong = feed(model, cache_of(model, "g-kv", BUDGET, when=keepkv.When(every=128)), text, mask, 61)
    assert distance(model, text, mask, scores, right) <= 2e-6 and right.evicted == record.evicted
    assert distance(model, text, mask, scores, wrong) > SHOWS
