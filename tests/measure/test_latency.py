"""A delay of known length shows where it belongs."""

from __future__ import annotations

import time

import pytest
import torch

from keepkv.measure.latency import latency

CPU = torch.device("cpu")


def test_a_sleeping_policy_shifts_the_first_token_alone() -> None:
    def plain() -> int:
        time.sleep(0.002)
        return 0

    def sleepy() -> int:
        time.sleep(0.06)
        return plain()

    def step(state: int) -> int:
        time.sleep(0.001)
        return state + 1

    quick, slow = (latency(read, step, 4, CPU, repeats=5, warmup=1) for read in (plain, sleepy))
    # Sleeping takes no less than asked, and on a busy machine more.
    assert min(slow.first.values) >= 0.062 and min(quick.first.values) >= 0.002
    assert min(slow.first.values) - min(quick.first.values) > 0.03
    assert min(quick.each.values) >= 0.001 and min(slow.each.values) < 0.03
    assert len(slow.first.values) == len(slow.each.values) == 5 and slow.tokens == 4


def test_every_step_takes_what_the_last_one_gave() -> None:
    seen = []

    def step(state: int) -> int:
        seen.append(state)
        return state + 1

    latency(lambda: 10, step, 3, CPU, repeats=2, warmup=1)
    assert seen == [10, 11] * 3
    with pytest.raises(ValueError, match="at least 1 reply"):
        latency(lambda: 0, step, 1, CPU)
