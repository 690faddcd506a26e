"""Tokens are drawn as asked, by random numbers of the request's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from keepkv.errors import KeepKVError
from keepkv.serve.batch.sampling import Sampler
from keepkv.serve.request import Compression, Sampling

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])


def drawn(count: int = 4000, **options: Any) -> torch.Tensor:
    sampler = Sampler(Sampling(1, seed=3, **options))
    return torch.tensor([sampler.draw(LOGITS).id for _ in range(count)]).bincount(minlength=5) / count


def test_frequencies_are_the_probabilities() -> None:
    for temperature in (0.5, 1.0, 2.0):
        expected = (LOGITS / temperature).softmax(-1)
        assert float((drawn(temperature=temperature) - expected).abs().max()) < 4 * (0.25 / 4000) ** 0.5


def test_top_p_keeps_the_likeliest_that_reach_it() -> None:
    chances = LOGITS.softmax(-1)
    kept = chances * torch.tensor([0, 1, 0, 0, 1])  # 0.46 and 0.28: together above 0.6, one alone is not
    assert float(chances[1]) < 0.6 < float(kept.sum())
    assert float((drawn(top_p=0.6) - kept / kept.sum()).abs().max()) < 4 * (0.25 / 4000) ** 0.5
    assert drawn(count=20, top_p=0.01).tolist() == [0, 1, 0, 0, 0]


def test_no_temperature_is_greedy_and_a_seed_repeats() -> None:
    assert drawn(count=10, temperature=0.0).tolist() == [0, 1, 0, 0, 0]
    one, two = (Sampler(Sampling(1, seed=seed)) for seed in (7, 7))
    assert [one.draw(LOGITS).id for _ in range(50)] == [two.draw(LOGITS).id for _ in range(50)]
    free = [Sampler(Sampling(1)) for _ in range(2)]
    many = [[x.draw(torch.zeros(1000)).id for _ in range(20)] for x in free]
    assert many[0] != many[1]


def test_log_probabilities_are_those_before_temperature() -> None:
    found = Sampler(Sampling(1, temperature=0.0, logprobs=2)).draw(LOGITS)
    own = LOGITS.log_softmax(-1)
    assert found.logprob == pytest.approx(float(own[1]))
    assert found.top == ((1, pytest.approx(float(own[1]))), (4, pytest.approx(float(own[4]))))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(ArithmeticError, match="not finite"):
        Sampler(Sampling(1)).draw(torch.tensor([0.0, bad]))


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": 0}, {"temperature": -0.1},
        {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"seed": 2**64}, {"logprobs": 21},
        {"stop": ("",)}, {"stop": ("a",) * 17}, {"stop": (3,)}, {"max_tokens": True},
    ],
)  # fmt: skip
def test_samplings_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(KeepKVError):
        Sampling(**{"max_tokens": 1, **options})


@pytest.mark.parametrize(
    "options", [{"budget": -0.1}, {"budget": float("nan")}, {"budget": 10**30}, {"every": 0}, {"spans": ((1, 2),)}]
)
def test_compressions_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(KeepKVError):
        Compression(**options)
