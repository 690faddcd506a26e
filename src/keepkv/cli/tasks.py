"""``keepkv tasks``: what an evaluation can ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keepkv.cli.options import AsJson, Import
from keepkv.cli.output import console, one_line_errors, print_json, table

if TYPE_CHECKING:
    from keepkv.tasks.base import Task
    from keepkv.tasks.files import Benchmark

GROUPS = {
    "ruler": "the thirteen shapes of RULER, in text of our own",
    "facts": "more facts hidden in prose",
    "rules": "rules in the prompt that a reply must keep",
    "replies": "long replies: the cache is compressed while they are decoded",
    "text": "no question: how likely a text's continuation stays",
    "vision": "pictures of our own: `keepkv eval --vlm`",
    "scenes": "moving scenes, which the model in the package that sees was trained on: `keepkv eval --vlm`",
    "registered": "registered by you or by an installed package",
    "files": "benchmarks of others, from files or a hub",
}


@one_line_errors
def tasks(imports: Import = None, as_json: AsJson = False) -> None:
    """List the tasks of `keepkv eval --task`, by group: a group is taken by its name too.

    \b
    Examples:
      keepkv tasks
      keepkv tasks --json
      keepkv eval --task ruler --task notes
      keepkv eval --task longbench:qasper=/data/qasper.jsonl --length 8192
    """
    from keepkv import tasks as known

    every = [*known.names(), *known.names(sees=True)]
    found = [_generated(known.get(name), known.group_of(name)) for name in every]
    found += [_read(name, held) for name, held in known.BENCHMARKS.items()]
    if as_json:
        print_json(found)
        return
    out = console()
    for group, words in GROUPS.items():
        mine = [one for one in found if one["group"] == group]
        if mine:
            out.print(f"\n[bold]{group}[/bold]: {words}")
            columns = ["name", "summary", *(["needs"] if any(one["needs"] for one in mine) else [])]
            listing = table(*({"name": "task", "summary": "asks for"}.get(one, one) for one in columns), left=3)
            for one in mine:
                listing.add_row(*(one[column] for column in columns))
            out.print(listing)


def _generated(task: Task, group: str) -> dict[str, Any]:
    needs = "a model that sees" if task.sees else "a model that follows instructions" if task.english else ""
    return {"name": task.name, "group": group, "summary": task.summary, "needs": needs}


def _read(name: str, held: Benchmark) -> dict[str, Any]:
    whole = f"{name}:PART" if held.parts else name
    needs = f"{whole}=FILE; or the extra eval and a network"
    return {"name": name, "group": "files", "summary": held.summary, "needs": needs, "parts": list(held.parts)}
