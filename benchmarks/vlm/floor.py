"""The noise under loyalty: the full cache against itself, and against transformers' own cache and attention.

python -m benchmarks.vlm.floor --out benchmarks/vlm/results
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import keepkv
from keepkv import tasks
from keepkv.evaluation.setup import HELD_OUT
from keepkv.evaluation.vision import noise_floor
from keepkv.measure import Ledger, MadeWith, Row
from keepkv.tasks.asking import encode
from keepkv.vision.seeing import Seeing


@dataclass(frozen=True, kw_only=True)
class FloorRow(Row):
    """again, plain: loyalty in per cent, and the lower end of its interval; n: replies."""

    tasks: list[str]
    length: int
    again: float
    again_low: float
    plain: float
    plain_low: float
    n: int
    made_with: MadeWith


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/vlm/results")
    parser.add_argument("--length", type=int, default=150)
    parser.add_argument("--items", type=int, default=2)
    asked = parser.parse_args()
    model, processor = keepkv.embedded_vlm()
    seeing = Seeing(model, processor.tokenizer, None, processor)
    names = list(tasks.chosen(["scenes"], sees=True))
    items = [
        encode(seeing, tasks.get(name).generate(seeing, asked.length, HELD_OUT + i))
        for name in names for i in range(asked.items)
    ]  # fmt: skip
    found = noise_floor(model, seeing, items)
    row = FloorRow(
        tasks=names, length=asked.length, again=found.again.micro, again_low=found.again.low, plain=found.plain.micro,
        plain_low=found.plain.low, n=found.again.n, made_with=MadeWith.of(model, "embedded-vlm"),
    )  # fmt: skip
    Ledger(Path(asked.out) / "floor.jsonl", FloorRow).append([row])
    print(f"again {row.again:.1f} %, plain {row.plain:.1f} % of {row.n} replies")


if __name__ == "__main__":
    main()
