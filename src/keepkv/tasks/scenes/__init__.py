"""Moving scenes: a fixed camera on a still room, things that come and go, and questions about what was seen."""

from keepkv.tasks.scenes.draw import CELLS, COLOURS, SHAPES, SIDE
from keepkv.tasks.scenes.questions import KINDS, WORDS, Asked, questions
from keepkv.tasks.scenes.story import CARD, Event, Scene, story

__all__ = [
    "CARD", "CELLS", "COLOURS", "KINDS", "SHAPES", "SIDE", "WORDS", "Asked", "Event", "Scene", "questions", "story",
]  # fmt: skip
