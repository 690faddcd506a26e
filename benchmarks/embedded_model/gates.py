"""Learned scores of the embedded model, all of the same texts; the package ships two of them.

    python -m benchmarks.embedded_model.gates --kind gates --out embedded-gates.safetensors
    python -m benchmarks.embedded_model.gates --kind fast-kvzip --out embedded-fast-kvzip.safetensors
    python -m benchmarks.embedded_model.gates --kind kvzap --out kvzap.safetensors

These two lie in ``src/keepkv/embedded/calibrations``.

The model answers questions of four tasks, ``TAUGHT``, whose facts stand between docstrings of which no task has a
sentence: many names with a code each, two names in one question, one long code, short facts. No other task, and no text
of any, was met.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.zoo.texts import texts
from keepkv import tasks
from keepkv.calibrate import Exchange, asks, calibrate
from keepkv.embedded import embedded_model
from keepkv.tasks import base
from keepkv.tasks.asking import Encoded, encode
from keepkv.tasks.text import sentences_of

TAUGHT = ("niah-multikey-1", "niah-multiquery", "niah-single-3", "qa-1", "niah-multikey-1")
LENGTHS = (256, 512, 768, 1024)
ITEMS = 320


def items(tokenizer: Any, count: int = ITEMS, seed: int = 0) -> Iterator[Encoded]:
    """Contexts of the tasks ``TAUGHT`` in prose that no task has."""
    rng, sentences = random.Random(seed), tuple(sentences_of(texts()))
    with mock.patch.object(base, "prose", lambda: sentences):
        for i in range(count):
            task, length = TAUGHT[i % len(TAUGHT)], rng.choice(LENGTHS)
            options = {}
            if task == "niah-multikey-1":
                options["facts"] = rng.randint(4, length // 16)  # few among much prose, or nearly nothing else
            if task == "niah-single-3":
                options["groups"] = rng.randint(1, 4)
            yield encode(tokenizer, tasks.get(task).generate(tokenizer, length, i, **options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=embedded_model(), help="folder; the embedded one if absent")
    parser.add_argument("--kind", required=True, choices=("gates", "fast-kvzip", "kvzap"))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    made = list(items(AutoTokenizer.from_pretrained(given.model)))
    read = [torch.tensor([one.context]) for one in made]
    asked = [[Exchange(x.prompt, x.answer) for x in one.asked] for one in made]
    command = f"python -m benchmarks.embedded_model.gates --kind {given.kind}"
    found = calibrate(given.kind, model, read, command, **({"asked": asked} if asks(given.kind) else {}))
    print("\n".join(found.made_with.get("says", ())))
    if given.kind == "fast-kvzip":  # half the size in the package
        rounded = {i: {name: x.bfloat16() for name, x in held.items()} for i, held in found.tensors.items()}
        found = replace(found, tensors=rounded)
    found.save(given.out)


if __name__ == "__main__":
    main()
