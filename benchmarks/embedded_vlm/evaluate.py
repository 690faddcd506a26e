"""Accuracy of the embedded vision-language model with the full cache, by kind of question and length of video.

python -m benchmarks.embedded_vlm.evaluate --out src/keepkv/embedded/vlm/accuracy.json
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keepkv.embedded import embedded_vlm
from keepkv.embedded.sight import IMAGE
from keepkv.measure import bootstrap
from keepkv.tasks.scenes import CELLS, KINDS, Asked, Scene, questions, story

from .data import normalised

SCENES = {16: 40, 64: 30, 256: 10}  # by frames
HELD_OUT = "held-out"  # of the seeds, none of which is trained on
EVENTS = {16: 3, 64: 10, 256: 16}


def scene_of(seed: int, length: int) -> Scene:
    """A scene that no training row is: its generator is seeded by another word."""
    return story(random.Random(f"{HELD_OUT}/{length}/{seed}"), length, EVENTS.get(length, 16), 2)


@torch.no_grad()
def answers(model: Any, processor: Any, scene: Scene, asked: list[Asked]) -> list[bool]:
    """Whether the first word of each answer is right, each question asked on its own of transformers' own cache."""
    from transformers import DynamicCache

    from keepkv.engine.versions import CACHE

    tokens = processor.tokenizer
    image = tokens.convert_tokens_to_ids(IMAGE)
    ids = torch.tensor([[tokens.bos_token_id] + [image] * (CELLS * scene.length)])
    cache = DynamicCache(config=model.config)
    places = torch.arange(ids.shape[1])[None]
    model(
        input_ids=ids, pixel_values=normalised(scene.frames()), position_ids=places, logits_to_keep=1, **{CACHE: cache}
    )
    right = []
    for one in asked:
        said = torch.tensor([tokens(one.text, add_special_tokens=False)["input_ids"]])
        at: Tensor = ids.shape[1] + torch.arange(said.shape[1])[None]
        logits = model(input_ids=said, position_ids=at, logits_to_keep=1, **{CACHE: cache}).logits[0, -1]
        cache.crop(-said.shape[1])
        right.append(int(logits.argmax()) == tokens.convert_tokens_to_ids(one.answer))
    return right


def table(rows: list[dict[str, Any]]) -> str:
    """Kinds by lengths, as the card shows them."""
    lengths = sorted({row["frames"] for row in rows})
    lines = ["| kind | " + " | ".join(f"{n} frames" for n in lengths) + " |", "|---" * (1 + len(lengths)) + "|"]
    for kind in KINDS:
        of = {row["frames"]: row for row in rows if row["kind"] == kind}
        cells = [
            f"{x['right']:.3f} [{x['low']:.2f}, {x['high']:.2f}] of {x['questions']}" for x in map(of.get, lengths) if x
        ]
        lines.append(f"| `{kind}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def evaluate(model: Any, processor: Any, length: int, scenes: int) -> list[dict[str, Any]]:
    """A row for each kind of question: the share of right answers, with its 95 % bootstrap interval over scenes."""
    found: dict[str, list[list[bool]]] = defaultdict(list)
    for seed in range(scenes):
        scene = scene_of(seed, length)
        asked = questions(scene)
        right = answers(model, processor, scene, asked)
        for kind in KINDS:
            if of_kind := [hit for one, hit in zip(asked, right, strict=True) if one.kind == kind]:
                found[kind].append(of_kind)
    rows = []
    for kind, groups in found.items():
        mean = bootstrap([sum(x) / len(x) for x in groups])
        hits = sum(map(sum, groups)) / sum(map(len, groups))
        row = {"kind": kind, "frames": length, "scenes": len(groups), "questions": sum(map(len, groups))}
        bounds = {"low": mean.low, "high": mean.high}
        rows.append(
            row | {"right": round(hits, 4)} | {k: None if x is None else round(x, 4) for k, x in bounds.items()}
        )
    return rows


def main() -> None:
    """Command line."""
    import transformers

    parser = argparse.ArgumentParser(description="Accuracy of the embedded vision-language model, full cache.")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(SCENES), help="frames of a video")
    parser.add_argument("--scenes", type=int, help="of each length; 40 of 16 frames, 30 of 64, 10 of 256 if absent")
    parser.add_argument("--out", type=Path, help="write the rows here as JSON")
    a = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = embedded_vlm()
    rows = [
        row for length in a.lengths for row in evaluate(model, processor, length, a.scenes or SCENES.get(length, 10))
    ]
    print(table(rows))
    if a.out:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        a.out.write_text(
            json.dumps({"seed": HELD_OUT, "cache": "full", "versions": versions, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
