"""The video that nobody has to bring: a scene in which little happens, and what is asked about it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from keepkv.cli.watch.run import FULL, Question, Watcher
from keepkv.tasks.scenes import CELLS, Scene, questions, story
from keepkv.tasks.scenes.story import LONGEST
from keepkv.video import VideoStream

KINDS = ("number", "place", "colour", "now", "last")  # what the embedded model answers surely with the full cache
EVENTS, CHANGES, ROUNDS, EACH = 18, 4, 6, 4  # of a video; questions of a round
BLOCK, RESERVE = 60, 24  # frames of a push; slots left to text


def scene(seed: int, frames: int) -> Scene:
    """A still room for ``frames`` frames, in which something is seen for two to four of them now and then."""
    rng = random.Random(f"watch/{seed}")
    part = (frames - 2 * LONGEST) // EVENTS
    starts = [i * part + rng.randrange(max(1, part - LONGEST)) for i in range(EVENTS)]
    return story(rng, frames, EVENTS, CHANGES, starts, cards=0.35)


def blocks(video: Scene) -> Iterator[Tensor]:
    """Its frames, made when they are due."""
    for start in range(0, video.length, BLOCK):
        yield video.frames(start, start + BLOCK)


def asked(video: Scene, seed: int) -> Callable[[int, int], list[Question]]:
    """What is asked in rounds, about what has been seen until then, long ago or just now."""
    rounds = {video.length * (i + 1) // ROUNDS // BLOCK * BLOCK for i in range(ROUNDS - 1)} | {video.length}

    def due(before: int, now: int) -> list[Question]:
        if now not in rounds:
            return []
        known = [x for x in questions(video.until(now)) if x.kind in KINDS]
        chosen = random.Random(f"asked/{seed}/{now}").sample(known, min(EACH, len(known)))
        return [Question(one.text, one.answer) for one in chosen]

    return due


def watchers(model: Any, processor: Any, policies: list[str], cap: int) -> list[Watcher]:
    """A stream for each policy, and one with the full cache for as long as the model's positions last."""
    limit = model.config.text_config.max_position_embeddings
    made = [Watcher(x, VideoStream(model, cap, processor, policy=x, text_reserve=RESERVE)) for x in policies]
    whole = VideoStream(model, limit, processor, positions="absolute", text_reserve=RESERVE)
    most = (limit - RESERVE) // CELLS // BLOCK * BLOCK
    made.append(Watcher(FULL, whole, most))
    for one in made:
        one.stream.prefix(processor.tokenizer.bos_token)
    return made
