"""Presets: for a kind of work, the method and options that measured best at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from keepkv.core.when import When


@dataclass(frozen=True)
class Preset:
    """A method by the work it is for.

    work: what it is for. method, options: what it stands for; options that are given beside its name count more. why:
    what was measured. cost: time and memory beyond a plain eviction. needs: what has to be done beside making a cache.
    """

    work: str
    method: str
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)
    cost: str = "none to speak of"
    needs: str = "nothing"


PRESETS: dict[str, Preset] = {
    "auto": Preset(
        work="a prompt, a reply; nothing is known of the question",
        method="compactor",
        why="",
    ),
    "long-document": Preset(
        work="a document with its question behind it, in one prompt",
        method="keepkv2",
        why="",
    ),
    "many-questions": Preset(
        work="a document that is compressed once and asked about many times",
        method="kvzip",
        why="",
        cost="the text is read twice",
        needs="keepkv.ask or keepkv.Context, which read it twice; by hand: keepkv.reread",
    ),
    "chat": Preset(
        work="a conversation of many turns",
        method="compactor",
        why="",
        options={"when": When(every=256)},
    ),
    "reasoning": Preset(
        work="a short prompt and a long reply",
        method="h2o",
        why="",
        options={"when": When(every=64)},
    ),
}
