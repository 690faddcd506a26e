"""What ``keepkv watch`` prints: a line that moves, answers as they come, and what survived."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from keepkv.cli.demo.strip import LEGEND, cell_of, cells, pointers, strip
from keepkv.cli.output import table
from keepkv.cli.watch.run import FULL, Question, Watcher
from keepkv.core.words import size

WIDEST = 100


def line(watchers: list[Watcher], seen: int, full: int) -> str:
    """Where a watch is. full: bytes of a full cache of what has been seen, by formula."""
    first = watchers[0]
    held = f"{first.stream.entries} slots per head of at most {first.stream.cap}, {size(first.bytes)}"
    return f"{seen:,} frames · {first.policy}: {held} · a full cache: {size(full)}"


def round_of(out: Console, watchers: list[Watcher], due: Sequence[Question]) -> None:
    """The answers to the questions that were just asked."""
    for i, question in enumerate(due):
        said = Text(f"  {question.text}  ")
        for one in watchers:
            if not one.open:
                said.append(f"{one.policy} –  ", "dim")
                continue
            reply = one.replies[i - len(due)]
            mark, style = {True: ("✓", "green"), False: ("✗", "red"), None: ("", "")}[reply.right]
            said.append(f"{one.policy} ").append(f"{reply.text or '…'} {mark}".strip(), style).append("  ")
        out.print(said)


def result(out: Console, watchers: list[Watcher], seen: int, full: int) -> None:
    """A row for each watcher."""
    known = any(reply.right is not None for one in watchers for reply in one.replies)
    shown = table("policy", *(["right"] if known else []), "slots per head", "most ever", "bytes")
    for one in watchers:
        right = [f"{one.right} of {len(one.replies)}"] if known else []
        until = "" if one.open else f" (until frame {one.most:,})"
        shown.add_row(
            one.policy + until, *right, f"{one.stream.entries:,}", f"{one.stream.peak_entries:,}", size(one.bytes)
        )
    out.print(shown)
    if any(one.policy == FULL for one in watchers):
        out.print("The full cache is measured for as long as the model's positions last.", style="dim")
    out.print(f"After {seen:,} frames a full cache has {size(full)}, by formula.", style="dim")


def survivors(out: Console, watchers: list[Watcher], steps: int, marks: list[int]) -> None:
    """A line for each watcher: which stretches of the video are still held. marks: steps at which something came."""
    held = [one for one in watchers if one.open]
    margin = max(len(one.policy) for one in held) + 2
    width = max(10, min(WIDEST, out.width - margin))
    if marks:
        out.print(" " * margin, pointers({cell_of(step, steps, width) for step in marks}, width), sep="")
    for one in held:
        out.print(one.policy.ljust(margin), strip(cells(one.survival(steps), width), {}), sep="")
    out.print(LEGEND.replace("the tokens", "the frames' tokens"), style="dim")
    if marks:
        out.print("▼ something came here", style="dim")
