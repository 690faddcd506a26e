"""What a stream of video still knows at an eighth of the full cache, policy by policy, on the embedded model.

    python -m benchmarks.video.run --out benchmarks/video/results

A scene is watched once with each policy, and everything that can be asked about it is asked at the end. Goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from keepkv.embedded import embedded_vlm
from keepkv.measure import MadeWith, bootstrap
from keepkv.score.base import Score
from keepkv.tasks.scenes import CELLS, KINDS, Asked, Scene, questions, story
from keepkv.video import VideoStream

FULL = "full"
POLICIES = (FULL, "infinipot-v", "tar", "van", "uniform", "sliding", "random", "leverage")
FRAMES, EVENTS, CHANGES = 128, 12, 2
SHARE, RESERVE = 8, 16  # the cap is one part of so many; slots of it left to text
SURE = ("colour", "place", "number", "seen", "now")  # kinds that the model answers with the full cache
EACH = 4  # questions of a kind and scene at most


def scene_of(seed: int) -> Scene:
    """A scene that the model has not been trained on."""
    return story(random.Random(f"video-study/{seed}"), FRAMES, EVENTS, CHANGES)


def asked_of(scene: Scene, seed: int) -> list[Asked]:
    """Some questions of each kind, the same for every policy."""
    rng, found = random.Random(f"video-questions/{seed}"), questions(scene)
    of = {kind: [x for x in found if x.kind == kind] for kind in KINDS}
    return [x for kind in KINDS for x in rng.sample(of[kind], min(EACH, len(of[kind])))]


def stream_of(model: Any, processor: Any, policy: str | Score) -> VideoStream:
    """A stream at an eighth of the slots that the full cache has, or with all of them."""
    whole = 1 + CELLS * FRAMES
    if policy == FULL:
        return VideoStream(model, whole + RESERVE, processor, positions="absolute", text_reserve=RESERVE)
    return VideoStream(model, whole // SHARE, processor, policy=policy, text_reserve=RESERVE)


def measure(model: Any, processor: Any, policy: str | Score, seed: int) -> dict[str, Any]:
    """A row: which questions of each kind were answered right."""
    scene = scene_of(seed)
    stream = stream_of(model, processor, policy)
    stream.prefix(processor.tokenizer.bos_token)
    stream.push(scene.frames())
    right: dict[str, list[int]] = defaultdict(list)
    for one in asked_of(scene, seed):
        said = str(stream.ask(one.text, max_new_tokens=1)).strip()
        right[one.kind].append(int(said == one.answer))
    row = {"policy": policy, "seed": seed, "right": dict(right)}
    return row | {"entries": stream.entries, "peak": stream.peak_entries, "cap": stream.cap, "bytes": stream.bytes}


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy on the sure kinds with its 95 % interval over scenes, beside infinipot-v in pairs; and of every kind."""
    of = {policy: {x["seed"]: x for x in rows if x["policy"] == policy} for policy in POLICIES}
    seeds = sorted(set.intersection(*(set(x) for x in of.values() if x)))  # that every policy has

    def share(row: dict[str, Any]) -> float:
        hits = [hit for kind in SURE for hit in row["right"].get(kind, [])]
        return sum(hits) / len(hits)

    lines = [f"| policy | slots | right | less infinipot-v | {' | '.join(KINDS)} |", "|---" * (4 + len(KINDS)) + "|"]
    for policy, found in of.items():
        if not found:
            continue
        mean = bootstrap([share(found[s]) for s in seeds])
        pair = bootstrap([share(found[s]) - share(of["infinipot-v"][s]) for s in seeds])
        kinds = []
        for kind in KINDS:
            hits = [hit for s in seeds for hit in found[s]["right"].get(kind, [])]
            kinds.append(f"{sum(hits) / len(hits):.2f}" if hits else "")
        beside = "" if policy == "infinipot-v" else f"{pair.mean:+.3f} [{pair.low:+.3f}, {pair.high:+.3f}]"
        name = f"{policy} | {found[seeds[0]]['peak']:,}"
        lines.append(f"| {name} | {mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}] | {beside} | {' | '.join(kinds)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--scenes", type=int, default=12)
    parser.add_argument("--policies", nargs="*", default=list(POLICIES))
    a = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = embedded_vlm()
    a.out.mkdir(parents=True, exist_ok=True)
    file = a.out / "eighth.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["policy"], row["seed"]) for row in rows}
    made_with = asdict(MadeWith.of(model, "embedded-vlm"))
    for seed in range(a.scenes):
        for policy in a.policies:
            if (policy, seed) in done:
                continue
            rows.append(measure(model, processor, policy, seed) | {"made_with": made_with})
            with file.open("a") as lines:
                lines.write(json.dumps(rows[-1]) + "\n")
        if seed:  # an interval takes two
            (a.out / "eighth.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
