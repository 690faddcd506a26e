"""10,000 frames through a cap: slots, memory and time per frame, and what is still known of rare events.

    python -m benchmarks.video.long --out benchmarks/video/results

A process for each policy, so that its memory is its own. Time is the processor's, beside that of a young stream which
watches the same frames in turn and begins anew every 500: so a machine that changes its pace is told from a stream that
does.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from keepkv.embedded import embedded_vlm
from keepkv.measure import MadeWith, bootstrap
from keepkv.tasks.scenes import Scene, questions, story
from keepkv.tasks.scenes.story import LONGEST
from keepkv.video import VideoStream

POLICIES = ("infinipot-v", "uniform", "sliding")
CAP, RESERVE, BLOCK = 512, 24, 100
RARE, RECENT = 18, 8  # events in the first nine tenths, and in the last tenth
KINDS = ("colour", "place", "number", "seen")


def scene_of(seed: int, frames: int) -> Scene:
    """A still room, in which something is to be seen for two to four frames once in some hundreds."""
    rng, edge = random.Random(f"long/{seed}"), frames * 9 // 10
    starts = _spread(rng, 0, edge, RARE) + _spread(rng, edge, frames, RECENT)
    return story(rng, frames, RARE + RECENT, 6, starts, cards=0.2)


def _spread(rng: random.Random, first: int, last: int, count: int) -> list[int]:
    part = (last - first) // count
    return [first + i * part + rng.randrange(part - 2 * LONGEST) for i in range(count)]


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def measure(policy: str, seed: int, frames: int) -> dict[str, Any]:
    """A row: what was held and taken every 500 frames, and which questions were answered right."""
    torch.set_num_threads(1)
    model, processor = embedded_vlm()
    scene = scene_of(seed, frames)
    stream, young = (VideoStream(model, CAP, processor, policy=policy, text_reserve=RESERVE) for _ in range(2))
    stream.prefix(processor.tokenizer.bos_token)
    track: list[dict[str, Any]] = []
    taken, beside = list[float](), list[float]()
    for start in range(0, frames, BLOCK):
        block = scene.frames(start, start + BLOCK)
        if start % 500 == 0:
            young.reset()
            young.prefix(processor.tokenizer.bos_token)
            young.push(block)  # until it is full
        began = time.process_time()
        now = stream.push(block)
        pushed = time.process_time()
        young.push(block)
        taken.append((pushed - began) / BLOCK)
        beside.append((time.process_time() - pushed) / BLOCK)
        if now.steps % 500 == 0:
            peak = {"entries": now.entries, "peak": stream.peak_entries, "bytes": now.bytes, "resident": resident()}
            ratio = statistics.median(x / y for x, y in zip(taken, beside, strict=True))
            ms = {"ms_per_frame": 1000 * statistics.mean(taken), "per_young": ratio}
            track.append({"frames": now.steps, **peak, **ms})
            taken, beside = [], []
            print(policy, seed, track[-1], file=sys.stderr, flush=True)
    right: dict[str, list[int]] = {"rare": [], "recent": []}
    for one in questions(scene):
        if one.kind in KINDS and one.about:
            said = str(stream.ask(one.text, max_new_tokens=1)).strip()
            right["recent" if min(one.about) >= frames * 9 // 10 else "rare"].append(int(said == one.answer))
    made_with = asdict(MadeWith.of(model, "embedded-vlm"))
    return {"policy": policy, "seed": seed, "frames": frames, "track": track, "right": right, "made_with": made_with}


def table(rows: list[dict[str, Any]]) -> str:
    """Answers, and how far slots and memory of each policy go apart from frame 500 on, and times within each stream."""
    lines = [
        "| policy | recent | rare | slots, from frame 500 | memory | ms per frame | of a young stream's |",
        "|---" * 7 + "|",
    ]
    for policy in dict.fromkeys(row["policy"] for row in rows):
        found = [row for row in rows if row["policy"] == policy]
        cells = []
        for part in ("recent", "rare"):
            hits = [float(hit) for row in found for hit in row["right"][part]]
            mean = bootstrap(hits)
            cells.append(f"{mean.mean:.2f} [{mean.low:.2f}, {mean.high:.2f}] of {len(hits)}")
        late = [x for row in found for x in row["track"] if x["frames"] >= 500]
        cells += [_range([x["peak"] for x in late], "{:,.0f}")]
        cells += [_range([x["resident"] / 1e6 for x in late], "{:,.0f} MB")]
        timed = [x for x in late if x["frames"] >= 1000]
        cells += [f"{statistics.median(x['ms_per_frame'] for x in timed):.1f}"]
        ratios = [x["per_young"] for x in timed]
        cells += [f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"]
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _range(values: list[float], form: str) -> str:
    low, high = min(values), max(values)
    return f"{form.format(low)} to {form.format(high)} (±{(high - low) / (high + low):.1%})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--policies", nargs="*", default=list(POLICIES))
    parser.add_argument("--one", nargs=2, help="measure this policy and seed, and print the row")
    a = parser.parse_args()
    if a.one:
        print(json.dumps(measure(a.one[0], int(a.one[1]), a.frames)))
        return
    a.out.mkdir(parents=True, exist_ok=True)
    file = a.out / "long.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["policy"], row["seed"]) for row in rows}
    for seed in range(a.seeds):
        for policy in a.policies:
            if (policy, seed) in done:
                continue
            command = [
                sys.executable,
                "-m",
                "benchmarks.video.long",
                "--frames",
                str(a.frames),
                "--one",
                policy,
                str(seed),
            ]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(json.loads(said))
            with file.open("a") as lines:
                lines.write(said)
            (a.out / "long.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
