"""Presets: for a kind of work, the method and options that measured best at it.

What they were chosen on is in ``benchmarks/defaults`` and, for a document with its question, in
``benchmarks/real_models``: real models that no method was tuned on, at equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from keepkv.core.when import When

DEFAULT = "auto"  # the preset that is taken where no method is named


@dataclass(frozen=True)
class Preset:
    """A method by the work it is for.

    work: what it is for. method, options: what it stands for; options that are given beside its name count more. why:
    what was measured. needs: time, memory and calls beyond those of any method. calibrated: what is taken instead where
    a calibration of a kind is given.
    """

    work: str
    method: str
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: str = "nothing"
    calibrated: Mapping[str, str] = field(default_factory=dict)

    def given(self, kinds: Iterable[str]) -> tuple[str, Mapping[str, Any]]:
        """The method and options that are taken where calibrations of ``kinds`` are given."""
        better = next((self.calibrated[kind] for kind in kinds if kind in self.calibrated), None)
        return (self.method, self.options) if better is None else (better, {})


PRESETS: dict[str, Preset] = {
    DEFAULT: Preset(
        work="a prompt, and nothing known of the question",
        method="keepkv2",
        options={"allocate": "adakv"},
        why=(
            "of the methods that read a text once none diverges less from the full cache's replies (SmolLM2-135M and "
            "Gemma 3 270M). Where calibration= has gates (keepkv calibrate gates) it is keepkv3, which diverges less "
            "than all, those that read twice included"
        ),
        calibrated={"gates": "keepkv3"},
    ),
    "long-document": Preset(
        work="a document with its question behind it, in one prompt",
        method="keepkv2",
        options={"allocate": "adakv", "floor": 1.0},
        why=(
            "as auto, but what the last queries ask for counts more beside what is rare in the text. With the question "
            "in sight it diverges a third less than auto at 10 and 25 % on SmolLM2-135M, less than snapkv at 10 % and "
            "as much from there on; it was chosen on Gemma 3 270M and Qwen2.5-Coder-0.5B"
        ),
    ),
    "many-questions": Preset(
        work="a document that is compressed once and asked about many times",
        method="kvzip",
        why=(
            "it keeps 56 of 97 replies of two real models at 40 % of the bytes, 25 at 20 %; the best that reads a text "
            "once keeps 43 and 25"
        ),
        needs="the text is read twice (keepkv.ask and keepkv.Context do; else keepkv.reread), and is whole until then",
    ),
    "chat": Preset(
        work="a conversation of many turns",
        method="keepkv2",
        options={"allocate": "adakv", "when": When(every=256)},
        why="as auto, since the next question is not known; compressing every 256 tokens was not measured by itself",
    ),
    "reasoning": Preset(
        work="a short prompt and a long reply",
        method="g-kv",
        options={"prompt": True, "when": When(every=64)},
        why=(
            "with the prompt kept it alone recalls every fact of a long reply of the model in the package at 96 slots "
            "and stays near the full cache's predictions; no real model was measured on them"
        ),
        needs="the prompt stays whole: a budget in slots or bytes counts it and must hold it",
    ),
}
