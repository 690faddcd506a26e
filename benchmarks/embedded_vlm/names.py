"""The first stage: the tower learns to name what is in each cell, in the words' own embeddings."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from keepkv.tasks.scenes import CARD, CELLS, COLOURS, SHAPES, SIDE
from keepkv.tasks.scenes.draw import NOISE, digit, mask, paint, room
from keepkv.tasks.scenes.questions import PLACES

from .data import normalised
from .network import features

NONE = -1
GROUPS = ((*SHAPES, CARD, "lamp"), tuple(COLOURS), tuple(map(str, range(10))), PLACES)
FULL = 6  # of a frame's cells that something stands in, at most


def frames(rng: random.Random, count: int) -> tuple[Tensor, Tensor]:
    """Frames (N,3,SIDE,SIDE) of uint8 with anything anywhere; which word of each group a cell shows (N,CELLS,4)."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    shown, labels = torch.empty(count, 3, SIDE, SIDE), torch.full((count, CELLS, len(GROUPS)), NONE)
    labels[..., 3] = torch.arange(CELLS)
    for frame, label in zip(shown, labels, strict=True):
        frame.copy_(room(generator))
        for cell in rng.sample(range(CELLS), rng.randint(1, FULL)):
            what, hue = rng.randrange(len(GROUPS[0])), rng.randrange(len(COLOURS))
            colour = COLOURS[GROUPS[1][hue]]
            label[cell, :2] = torch.tensor([what, hue])
            if GROUPS[0][what] == CARD:
                number = rng.randrange(10)
                label[cell, 2] = number
                paint(frame, cell, mask("all"), colour)
                paint(frame, cell, digit(number), (0, 0, 0))
            else:
                paint(frame, cell, mask(GROUPS[0][what]), colour)
    shown += NOISE * torch.randn(shown.shape, generator=generator)
    return shown.round_().clamp_(0, 255).to(torch.uint8), labels


def learn(model: Any, tokenizer: Any, steps: int, rate: float, seed: int, size: int = 32) -> None:
    """Train tower and projector for so many steps."""
    seeing = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    optimizer = torch.optim.AdamW(seeing, rate, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    words = model.get_input_embeddings().weight.detach().clone()
    words[:, 0] = 0  # the constant, which says nothing
    told = [words[tokenizer.convert_tokens_to_ids(list(group))] for group in GROUPS]
    for step in range(steps):
        shown, labels = frames(random.Random(f"names/{seed}/{step}"), size)
        seen = features(model, normalised(shown))
        loss, right = torch.zeros(()), []
        for i, group in enumerate(told):
            # Nothing of a group has the logit 0.
            logits = torch.nn.functional.pad(2 * seen @ group.T, (1, 0)).flatten(0, 1)
            want = labels[..., i].flatten() + 1
            loss = loss + torch.nn.functional.cross_entropy(logits, want)
            there = want > 0
            right.append((logits.argmax(-1) == want)[there].float().mean().item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(seeing, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(
                f"names {step + 1}/{steps}  loss {loss.item():.3f}  right {' '.join(f'{x:.3f}' for x in right)}",
                flush=True,
            )
