"""What a method asks for and what it does, found from its pieces: nobody has to write it down."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from keepkv.allocate.base import Allocate
from keepkv.core.when import When
from keepkv.reduce.base import Reduce
from keepkv.score.base import Score

YOURS = "Yours."
_ROOM = __name__.rpartition(".")[0]


def group_of(factory: Callable[..., Any]) -> str:
    """The family of a method: what the file that it is registered in says of itself, or the folder of that file."""
    name = factory.__module__
    if not name.startswith(_ROOM + "."):
        return YOURS
    family = ".".join(name.split(".")[: len(_ROOM.split(".")) + 1])
    return (inspect.getdoc(sys.modules[family]) or YOURS).split("\n\n")[0].replace("\n", " ")


def needs(score: Score, allocate: Allocate, reduce: Reduce) -> list[str]:
    """What a method of these pieces asks for beyond a forward over the text, in words."""
    kind = score.needs_calibration or allocate.needs_calibration
    asked = [
        (score.needs_second_reading, "a second reading of the text: keepkv.reread, or keepkv.ask"),
        (score.needs_questions, "questions that may come: keepkv.rehearse"),
        (kind is not None, f"a calibration: keepkv calibrate {kind}"),
        (allocate.joint or score.looks_again, "memory for the whole prompt until it is compressed"),
        (score.needs_rope, "a rotary embedding of known layout"),
        (score.needs_output, "the weights of the attention's output projection"),
        (score.needs_hidden, "the hidden states of each layer"),
        (reduce.merges, "keys apart from values: not latent attention (MLA)"),
    ]
    return [words for needed, words in asked if needed]


def does(score: Score, allocate: Allocate, reduce: Reduce, when: When) -> list[str]:
    """What a method of these pieces does to slots and budgets, in words."""
    stats = len(score.stats)
    by_layer = allocate.joint or type(allocate).layer_budget is not Allocate.layer_budget
    done = [
        (score.observes, "looks at queries"),
        (not score.observes and not score.looks_again, "looks at no query"),
        (allocate.ragged, "gives each head a budget of its own"),
        (by_layer, "gives each layer a budget of its own"),
        (reduce.merges, "changes what stays by what leaves"),
        (when.every is not None, f"compresses every {when.every} decoded tokens"),
        (score.follows_decode, "follows the attention of each decoded token"),
        (stats > 0, f"keeps {4 * stats} bytes beside each slot"),
    ]
    return [words for true, words in done if true]
