"""Training rows: a scene, frame by frame, and as many questions about it as fit."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keepkv.tasks.scenes import CELLS, KINDS, questions, story
from keepkv.tasks.scenes.story import LONGEST

from .network import BOS, EOS, IMAGE

LIMIT = 4000  # rotary positions of a row
MEAN, STD = 0.5, 0.5  # of each colour


@dataclass
class Batch:
    """ids, positions (B,T); pixels (N,3,H,W); at: which of the B·T tokens come before an answer; kinds: of answers."""

    ids: Tensor
    positions: Tensor
    pixels: Tensor
    at: Tensor
    kinds: list[int]


def normalised(frames: Tensor) -> Tensor:
    """Frames of uint8 as the model takes them."""
    return (frames.float() / 255 - MEAN) / STD


def row(
    rng: random.Random, tokenizer: Any, frames: int, asked: int, kinds: tuple[str, ...] = KINDS
) -> tuple[list[int], list[int], Tensor, list[tuple[int, int]]]:
    """Ids, positions, pixels, and (place of the token before it, kind) of each answer; ``asked`` tokens of text."""
    most = min(20, max(1, frames // LONGEST))
    scene = story(
        rng, frames, rng.randint(max(1, min(most // 2, frames // 16)), most), rng.randint(0, min(3, frames // 6))
    )
    ids = [tokenizer.bos_token_id] + [tokenizer.convert_tokens_to_ids(IMAGE)] * (CELLS * frames)
    found = [x for x in questions(scene) if x.kind in kinds]
    rng.shuffle(found)
    taken = sorted(found, key=lambda x: sum(y.kind == x.kind for y in found[: found.index(x)]))  # kinds in turn
    answers, end = [], len(ids) + asked
    chosen = taken[: asked // 8]
    rng.shuffle(chosen)
    for x in chosen:
        text = tokenizer.convert_tokens_to_ids([*x.text.split(), x.answer, EOS])
        if len(ids) + len(text) > end:
            break
        ids += text
        answers.append((len(ids) - 3, KINDS.index(x.kind)))
    text_start = end - asked
    ids += [tokenizer.pad_token_id] * (end - len(ids))
    return ids, _positions(rng, frames, len(ids) - text_start), normalised(scene.frames()), answers


def _positions(rng: random.Random, frames: int, text: int) -> list[int]:
    """Of a row whose frames are not always side by side: at a few places some time is missing."""
    spare = LIMIT - text - 1 - CELLS * frames
    jumps = [0] * (frames + 1)
    if rng.random() < 0.7:
        for _ in range(rng.randint(1, 6)):
            jump = int(spare ** rng.random())
            jumps[rng.randrange(frames + 1)] += jump
            spare = max(1, spare - jump)
    out, at = [0], 1
    for i in range(frames):
        at += jumps[i]
        out += range(at, at + CELLS)
        at += CELLS
    at += jumps[frames]
    return out + list(range(at, at + text))


def batch(
    rng: random.Random, tokenizer: Any, frames: int, asked: int, rows: int, kinds: tuple[str, ...] = KINDS
) -> Batch:
    """``rows`` rows of so many ``frames`` and ``asked`` tokens of text."""
    made = [row(rng, tokenizer, frames, asked, kinds) for _ in range(rows)]
    length = len(made[0][0])
    return Batch(
        torch.tensor([x[0] for x in made]),
        torch.tensor([x[1] for x in made]),
        torch.cat([x[2] for x in made]),
        torch.tensor([i * length + at for i, x in enumerate(made) for at, _ in x[3]]),
        [kind for x in made for _, kind in x[3]],
    )


__all__ = ["BOS", "Batch", "batch", "normalised", "row"]
