"""Trains the embedded vision-language model on generated scenes, on one core of a CPU.

    python -m benchmarks.embedded_vlm.train --out DIR

First the tower learns to name what it sees (``names``), then it stays as it is and the language model learns to answer.
Goes on where a checkpoint in DIR stopped.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.embedded_model.optimizer import Optimizer
from keepkv.tasks.scenes import KINDS

from . import names
from .data import Batch, batch
from .network import features, hidden, make_model, make_tokenizer, text_weights

CURRICULUM = "6:64:24:600,16:96:12:800,32:128:8:600+64:160:4:300"
STATE = "training.pt"
NAMED = "named.pt"
END = 0.1  # weight of the token that ends an answer


def losses(model: Any, made: Batch) -> tuple[Tensor, Tensor]:
    """The loss, and which answers were right."""
    with torch.no_grad():
        seen = features(model, made.pixels)
    states = hidden(model, made.ids, seen, made.positions).flatten(0, 1)
    flat = made.ids.flatten()
    cross = torch.nn.functional.cross_entropy
    logits, ends = model.lm_head(states[made.at]), model.lm_head(states[made.at + 1])
    loss = cross(logits, flat[made.at + 1]) + END * cross(ends, flat[made.at + 2])
    return loss, logits.detach().argmax(-1) == flat[made.at + 1]


def plan(curriculum: str) -> list[tuple[int, int, int]]:
    """(frames, tokens of text, rows) of each step, in order; stages joined by "+" are mixed."""
    steps: list[tuple[int, int, int]] = []
    for stage in curriculum.split(","):
        mixed = []
        for part in stage.split("+"):
            frames, asked, rows, count = map(int, part.split(":"))
            mixed += [(frames, asked, rows)] * count
        random.Random(len(steps)).shuffle(mixed)
        steps += mixed
    return steps


def begin_with(model: Any, state: dict[str, Tensor]) -> None:
    """Take weights of a model that may know fewer words: the first ones of this one's."""
    own = model.state_dict()
    for name, value in state.items():
        own[name][: len(value)] = value


def train(
    out: Path,
    curriculum: str = CURRICULUM,
    rate: float = 3e-3,
    seed: int = 0,
    start: Path | None = None,
    kinds: tuple[str, ...] = KINDS,
    naming: int = 800,
    stop: int | None = None,
) -> None:
    """Train, with a line every 20 steps and a checkpoint every 50.

    out: directory of checkpoints; where it has one, training goes on. start: begin with the weights of this one, whose
    tower stays. kinds: of questions. naming: steps of the first stage. stop: after so many steps of the curriculum.
    """
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    out.mkdir(parents=True, exist_ok=True)
    if start is not None:
        begin_with(model, torch.load(start / STATE, weights_only=True)["model"])
    elif (out / NAMED).exists():
        model.load_state_dict(torch.load(out / NAMED, weights_only=True))
    else:
        names.learn(model, tokenizer, naming, 3e-3, seed)
        torch.save(model.state_dict(), out / NAMED)
    steps, first = plan(curriculum), 0
    optimizer = Optimizer(text_weights(model), rate, len(steps))
    if (out / STATE).exists():
        held = torch.load(out / STATE, weights_only=True)
        model.load_state_dict(held["model"])
        optimizer.adam.load_state_dict(held["adam"])
        optimizer.momentum, first = held["momentum"], held["step"]
    right: dict[int, list[float]] = defaultdict(list)
    lost, began = [], time.monotonic()
    last = len(steps) if stop is None else min(stop, len(steps))
    for i in range(first, last):
        optimizer.schedule(i)
        frames, asked, rows = steps[i]
        made = batch(random.Random(f"{seed}/{i}"), tokenizer, frames, asked, rows, kinds)
        loss, hits = losses(model, made)
        loss.backward()
        optimizer.step()
        lost.append(loss.item())
        for kind, hit in zip(made.kinds, hits.tolist(), strict=True):
            right[kind].append(hit)
        if (i + 1) % 20 == 0 or i + 1 == last:
            told = "  ".join(f"{KINDS[k]} {sum(x) / len(x):.2f}" for k, x in sorted(right.items()))
            spent = (time.monotonic() - began) / (i + 1 - first)
            print(
                f"{i + 1}/{len(steps)}  {frames} frames  loss {sum(lost) / len(lost):.3f}  {told}  {spent:.2f} s/step",
                flush=True,
            )
            lost, right = [], defaultdict(list)
        if (i + 1) % 50 == 0 or i + 1 == last:
            state = {"model": model.state_dict(), "adam": optimizer.adam.state_dict()}
            torch.save(state | {"momentum": dict(optimizer.momentum), "step": i + 1}, out / f"{STATE}.new")
            (out / f"{STATE}.new").replace(out / STATE)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the embedded vision-language model.")
    parser.add_argument("--out", type=Path, required=True, help="directory of checkpoints")
    parser.add_argument("--start", type=Path, help="begin with the weights of this one")
    parser.add_argument("--curriculum", default=CURRICULUM, help="frames:text:rows:steps, comma separated; + mixes")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--naming", type=int, default=800, help="steps of the first stage")
    parser.add_argument("--stop", type=int, help="after so many steps of the curriculum")
    parser.add_argument("--kinds", default=",".join(KINDS))
    a = parser.parse_args()
    torch.set_num_threads(1)
    train(a.out, a.curriculum, a.rate, a.seed, a.start, tuple(a.kinds.split(",")), a.naming, a.stop)


if __name__ == "__main__":
    main()
