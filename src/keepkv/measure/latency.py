"""Time to the first token, and for each further one, of anything that reads a prompt and then decodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from keepkv.measure.interval import Percentiles
from keepkv.measure.meters import Time


@dataclass(frozen=True)
class Latency:
    """Seconds. first: from the prompt to its first token, what is seen encoded and what leaves compressed on the way.
    each: for a further token, mean over one reply. tokens: of a reply."""

    first: Percentiles
    each: Percentiles
    tokens: int


def latency(
    read: Callable[[], Any],
    step: Callable[[Any], Any],
    tokens: int,
    device: torch.device,
    repeats: int = 10,
    warmup: int = 3,
) -> Latency:
    """Measures ``repeats`` replies of ``tokens`` tokens, ends of text left out of account, behind ``warmup`` more.

    read() reads the prompt, compresses, and finds the first token; step(state) takes what it or ``step`` returned and
    finds the next one. Both are timed until the device is done.
    """
    if repeats < 1 or tokens < 2:
        raise ValueError(f"latency(repeats={repeats}, tokens={tokens}): at least 1 reply of 2 tokens")
    first: list[float | None] = []
    each: list[float | None] = []
    for turn in range(warmup + repeats):
        with Time(device) as reading:
            state = read()
        with Time(device) as decoding:
            for _ in range(tokens - 1):
                state = step(state)
        if turn >= warmup:
            first.append(reading.seconds)
            each.append(decoding.seconds / (tokens - 1))
    ttft, tpot = Percentiles.of(first), Percentiles.of(each)
    assert ttft is not None and tpot is not None
    return Latency(ttft, tpot, tokens)
