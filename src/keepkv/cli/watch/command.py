"""``keepkv watch``: a video of any length through a cap, with questions as it goes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from keepkv.cli.options import AsJson, Device, Texts
from keepkv.cli.output import console, one_line_errors, print_json, waiting
from keepkv.cli.progress import moving
from keepkv.errors import KeepKVError

if TYPE_CHECKING:
    from keepkv.cli.watch.run import Question, Watcher

POLICIES = ("infinipot-v", "uniform", "sliding")
CAP, OWN_CAP = 288, 4096


@one_line_errors
def watch(
    file: Annotated[str | None, Argument(metavar="[FILE]", help="Your own video; a generated one if absent.")] = None,
    model: Annotated[str | None, Option(help="Directory or Hub name of a model that sees, for your video.")] = None,
    question: Annotated[Texts, Option("--question", "-q", help="About your video. Repeatable.")] = None,
    policy: Annotated[
        Texts, Option("--policy", "-p", help="infinipot-v, uniform, sliding, tar, van, random or a score. Repeatable.")
    ] = None,
    cap: Annotated[
        int | None, Option(min=1, help="Slots per head, never passed; 288, or 4096 with your video.")
    ] = None,
    frames: Annotated[int, Option(min=300, help="Frames of the generated video.")] = 2400,
    every: Annotated[int, Option(min=1, help="Of your video, watch one frame of so many.")] = 1,
    asked_every: Annotated[int | None, Option(min=1, help="Ask after so many frames too, not at the end only.")] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Length of an answer about your video.")] = 64,
    seed: Annotated[int, Option(help="Another seed makes another video.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Watch a video of any length in a memory that does not grow, and answer as it goes.

    Without arguments: a generated video in which something is to be seen now and then, and a small model; both are in
    the package. It shows what each policy still knows, and which frames it has kept.

    \b
    Examples:
      keepkv watch
      keepkv watch --frames 10000 --cap 384 --policy infinipot-v --policy tar
      keepkv watch walk.mp4 --model Qwen/Qwen2.5-VL-3B-Instruct --question "What did the dog do?" --every 12
    """
    if file is None and (question or model):
        raise KeepKVError("--question and --model are about a video of your own: give its file")
    if file is not None and not (question and model):
        raise KeepKVError("a video of your own needs --model, a model that sees, and a --question or more")
    with waiting("importing transformers"):
        from keepkv.cli.load import load_embedded_vlm, load_vlm
        from keepkv.cli.watch import own, run, shipped
        from keepkv.video import VideoStream
    if file is None:
        network, processor = load_embedded_vlm(device)
        video = shipped.scene(seed, frames)
        watchers = shipped.watchers(network, processor, list(policy or POLICIES), cap or CAP)
        going = run.watch(watchers, shipped.blocks(video), shipped.asked(video, seed))
        _report(going, watchers, network, [event.start for event in video.events], as_json)
        return
    assert model is not None and question is not None
    blocks = own.blocks(file, every)
    network, processor = load_vlm(model, device)
    watchers = [
        run.Watcher(x, VideoStream(network, cap or OWN_CAP, processor, policy=x)) for x in policy or POLICIES[:1]
    ]
    before, form = own.around(processor, watchers[0].stream.reader.family)
    for one in watchers:
        if before:
            one.stream.prefix(before)
    last = [run.Question(text) for text in question]
    due = own.asked(question, asked_every)
    going = run.watch(watchers, blocks, due, last, form, max_new_tokens)
    _report(going, watchers, network, [], as_json)


def _report(
    going: Iterable[Sequence[Question]], watchers: list[Watcher], model: Any, marks: list[int], as_json: bool
) -> None:
    """Show a watch as it goes, and its result."""
    from keepkv.cli.watch import run, show

    out, began, first = console(), time.monotonic(), watchers[0]
    each, full = first.stream.reader.family.frames, 0
    with moving() as move:
        for due in going:
            seen = first.stream.counts
            full = run.full_bytes(model, seen.prefix + seen.steps * first.stream.reader.cells)
            move(now := show.line(watchers, first.frames, full))
            if due and not as_json:
                out.print(now)
                show.round_of(out, watchers, due)
    steps = -(-first.frames // each)
    if as_json:
        print_json(_as_dict(watchers, full, steps, time.monotonic() - began))
        return
    out.print()
    show.result(out, watchers, first.frames, full)
    out.print()
    show.survivors(out, watchers, steps, [mark // each for mark in marks])


def _as_dict(watchers: list[Watcher], full: int, steps: int, seconds: float) -> dict[str, Any]:
    from keepkv.cli.demo.strip import cells

    return {
        "frames": watchers[0].frames,
        "full_bytes": full,
        "seconds": seconds,
        "rows": [
            {
                "policy": one.policy,
                "until": None if one.open else one.most,
                "right": one.right,
                "replies": [asdict(reply) for reply in one.replies],
                "entries": one.stream.entries,
                "peak_entries": one.stream.peak_entries,
                "bytes": one.bytes,
                "survival": cells(one.survival(steps), 64) if one.open else [],
            }
            for one in watchers
        ],
    }
