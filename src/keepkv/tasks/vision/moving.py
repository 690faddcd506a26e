"""Questions about moving scenes, a task for each kind: what the model in the package that sees was trained on."""

from __future__ import annotations

import random
from functools import partial

from keepkv.tasks.base import Count, Item, Question, Task, TaskError
from keepkv.tasks.scenes import KINDS, questions, story
from keepkv.tasks.scenes.story import LONGEST
from keepkv.vision.mark import MARK

LEAST, DRAWS, MOST = 8, 200, 3  # frames of a scene, scenes that are tried, questions that are asked
FRAMES_PER_EVENT = 6


def scene_item(rng: random.Random, count: Count, length: int, kind: str) -> Item:
    """A scene of as many frames as ``length`` tokens hold, and up to three questions of ``kind``."""
    one, several = count(MARK), count(MARK * 2)
    frames = (length - 1 - (2 * one - several)) // max(1, several - one)  # one token begins the text
    if frames < LEAST:
        raise TaskError(f"{length} tokens hold {frames} frames, and a scene has {LEAST}: give longer contexts")
    events = max(2, min(frames // LONGEST, frames // FRAMES_PER_EVENT, 16))
    for _ in range(DRAWS):
        scene = story(rng, frames, events, min(2, frames - 1))
        found = [asked for asked in questions(scene) if asked.kind == kind]
        if found:
            chosen = rng.sample(found, min(MOST, len(found)))
            asked = tuple(Question(f" {x.text}", f" {x.answer}") for x in chosen)
            return Item(MARK * frames, asked, pictures=(scene.frames(),))
    raise TaskError(f"no scene of {frames} frames was found that {kind!r} can be asked of: give longer contexts")


_HINT = "Answer with one word only."
TASKS = tuple(
    Task(
        f"scene-{kind}",
        f"a moving scene: {kind!r}, a kind of question",
        partial(scene_item, kind=kind),
        _HINT,
        sees=True,
    )
    for kind in KINDS
)
