"""``keepkv eval``: tasks × methods × budgets, with intervals and receipts."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from keepkv.cli.load import load, load_seeing
from keepkv.cli.options import AsJson, Device, Import, Model, Texts
from keepkv.cli.output import console, one_line_errors, print_json, progress_rows, resume, table
from keepkv.errors import KeepKVError

if TYPE_CHECKING:
    from keepkv.evaluation.rows import CellRow
    from keepkv.evaluation.vision import Aggregate

TASKS = ("niah-multikey-1", "niah-multiquery", "variable-tracking", "qa-1")
METHODS = ("auto", "keepkv")
BUDGETS = ("10%bytes", "20%bytes")
VISION_TASKS, SCENES = ("vision",), ("scenes",)  # the second are what the model in the package was trained on
SCENE_LENGTH = 300
VISION_METHODS = ("h2o", "pyramidkv", "vl-cache", "text-first", "visionzip", "prumerge-plus")
VISION_BUDGETS = ("0.2", "0.4")  # of the tokens: what a reducer counts, too
# Fields of a ``Setup`` that an option is called otherwise than.
FIELDS = {
    "task": "tasks", "method": "variants", "budget": "budgets", "length": "lengths", "mode": "modes", "seed": "seeds",
}  # fmt: skip


@one_line_errors
def evaluation(
    context: typer.Context,
    model: Model = None,
    task: Annotated[
        Texts, Option("--task", "--tasks", "-t", help="Name or group, see `keepkv tasks`, or 'all'. Repeatable.")
    ] = None,
    method: Annotated[
        Texts, Option("--method", "--methods", "-m", help="NAME or NAME:key=value,key=value, or 'all'. Repeatable.")
    ] = None,
    budget: Annotated[
        Texts,
        Option(
            "--budget",
            "--budgets",
            "-b",
            help="Share of the bytes of a plain cache (10%bytes) or of the tokens (0.1), or slots per head (512). "
            "Repeatable.",
        ),
    ] = None,
    length: Annotated[list[int] | None, Option("--length", "-l", help="Tokens of a context. Repeatable.")] = None,
    mode: Annotated[Texts, Option(help="agnostic: compressed before the question is seen; aware. Repeatable.")] = None,
    items: Annotated[int, Option(min=1, help="Contexts per task, length and seed.")] = 25,
    seed: Annotated[
        list[int] | None, Option("--seed", "--seeds", help="Random seed; each has items of its own. Repeatable.")
    ] = None,
    batch: Annotated[int, Option(min=1, help="Batch size: contexts read together.")] = 8,
    sinks: Annotated[int, Option(help="First tokens that every method keeps; -1 keeps each method's default.")] = 4,
    window: Annotated[int, Option(help="Last tokens that every method keeps; -1 keeps each method's default.")] = 16,
    every: Annotated[int, Option(min=1, help="Decoded tokens between compressions, in long replies.")] = 16,
    plain: Annotated[
        bool | None,
        Option("--plain/--terse", help="Plain-English prompts: the default for every model but the embedded one."),
    ] = None,
    vlm: Annotated[
        bool, Option("--vlm", help="A model that sees, on tasks with pictures; reducers can be given as methods.")
    ] = False,
    size: Annotated[
        str | None,
        Option(metavar="HxW", help="With --vlm: size of pictures, for models that take any."),
    ] = None,
    device: Device = "auto",
    out: Annotated[
        str | None,
        Option(
            help="Directory of the results. An unfinished run in it is resumed; a finished one is given what is new."
        ),
    ] = None,
    add: Annotated[
        str | None,
        Option(help="Directory of a finished evaluation to add to: what is not given is as it was there."),
    ] = None,
    imports: Import = None,
    as_json: AsJson = False,
) -> None:
    """Score methods on generated tasks that need no network, beside the full cache, random and a plain eviction.

    A context is compressed once per method and budget, before its questions are seen unless --mode aware; each question
    is asked on a copy. At 10%bytes every method holds a tenth of the bytes of a plain cache, whatever its slots weigh.
    Every method keeps the same sinks and window.

    \b
    Examples:
      keepkv eval
      keepkv eval --task all --method all --budget 5%bytes --budget 10%bytes --items 50 --out results
      keepkv eval --add results --import my_score.py --method my-score
      keepkv eval --model Qwen/Qwen3-0.6B -t niah-multikey-1 -t qa-2 -m keepkv -m keepkv:key=zip -l 4096
      keepkv eval -t long-decode -m tova -b 64 --every 8 --json
      keepkv eval --vlm -m vl-cache -m text-first -m visionzip -b 0.2
    """
    from keepkv import tasks as known
    from keepkv.cli import arguments
    from keepkv.evaluation.runner import evaluate, total
    from keepkv.evaluation.setup import Setup
    from keepkv.methods import METHODS as REGISTRY
    from keepkv.tasks.length import check_tokens

    if add is not None and out is not None:
        raise KeepKVError("--add names the directory that is added to: leave out --out")
    usual = VISION_METHODS if vlm else METHODS
    names = [name for name in REGISTRY if name != "full"] if method == ["all"] else method or list(usual)
    is_plain = plain if plain is not None else model is not None
    given: dict[str, Any] = {
        "model": "embedded" if model is None else model,
        "tasks": known.chosen(task or (TASKS if not vlm else VISION_TASKS if model else SCENES), sees=vlm),
        "variants": tuple(arguments.variant(name, reducers=vlm) for name in names),
        "budgets": tuple(budget or (VISION_BUDGETS if vlm else BUDGETS)),
        "lengths": tuple(length or (SCENE_LENGTH if vlm and model is None else 1024,)),
        "modes": tuple(mode or ("agnostic",)),
        "items": items,
        "seeds": tuple(seed or (0,)),
        "batch": 1 if vlm else batch,
        "sinks": None if sinks < 0 else sinks,
        "window": None if window < 0 else window,
        "every": every,
        "plain": is_plain,
        "slack": 24 if is_plain else 0,
        "size": arguments.size(size),
    }
    if add is not None:
        typed = {FIELDS.get(name, name) for name in context.params if _typed(context, name)}
        given = _held(add) | {name: value for name, value in given.items() if name in typed}
    setup = Setup(**given)
    if setup.sees != vlm:
        raise KeepKVError(
            "tasks with pictures and tasks without cannot be mixed: give --vlm for the first, and leave it out for the "
            f"second; given were {', '.join(setup.tasks)}"
        )
    name = None if setup.model == "embedded" else setup.model
    network, tokenizer = load_seeing(name, device, setup.size) if vlm else load(name, device)
    check_tokens(network, max(setup.lengths), "a context")
    where = add or out
    with tempfile.TemporaryDirectory() as scratch, progress_rows(total(setup), resume(where)) as step:
        cells = evaluate(network, tokenizer, setup, where or scratch, step, add=add is not None)
        bench = _bench(where or scratch) if vlm else []
    if as_json:
        print_json({"cells": cells, "bench": bench} if vlm else cells)
    else:
        _show(cells)
        _show_bench(bench)
        if where is not None:
            typer.echo(f"wrote {Path(where)}; keepkv report {where} makes a page of it")
    if failed := sum(cell.failed for cell in cells):
        reason = next(cell.error for cell in cells if cell.error)
        raise KeepKVError(f"{failed} items could not be run, e.g.: {reason}")


def _typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _held(folder: str) -> dict[str, Any]:
    """The fields of the ``Setup`` of what is in ``folder``."""
    from keepkv.evaluation.journal import read_run
    from keepkv.evaluation.rows import RUN
    from keepkv.evaluation.setup import Setup

    if not (Path(folder).expanduser() / RUN).exists():
        raise KeepKVError(f"{folder!r} holds no evaluation to add to: make one with `keepkv eval --out {folder}`")
    setup = Setup.from_dict(read_run(Path(folder).expanduser()))
    return {one.name: getattr(setup, one.name) for one in fields(setup)}


def _show(cells: list[CellRow]) -> None:
    from keepkv.tasks import group_of

    groups: dict[tuple[str, int, str], list[CellRow]] = defaultdict(list)
    for cell in cells:
        groups[cell.task, cell.length, cell.mode].append(cell)
    out = console()
    for (task, length, mode), mine in groups.items():
        words = {"agnostic": "before the question is seen", "aware": "with the question", "decode": "while decoding"}
        out.print(f"\n[bold]{task}[/bold], {length} tokens, compressed {words[mode]}")
        made = table("method", "budget", "ratio", "score", "95 %", "− full", "95 %", "items")
        for cell in mine:
            made.add_row(
                cell.method, str(cell.budget), _number(cell.ratio), _number(cell.score),
                _span(cell.low, cell.high), _number(cell.minus_full, "+"),
                _span(cell.minus_full_low, cell.minus_full_high), str(cell.n),
            )  # fmt: skip
        out.print(made)
    if any(group_of(task) == "ruler" for task, _, _ in groups):
        out.print("\nText of our own, shaped like RULER's tasks: not to be compared with published RULER numbers.")
    out.print("ratio: bytes kept / bytes of a plain cache. − full: paired difference to the full cache, same items.")
    if any(isinstance(cell.budget, float) and cell.budget < 1 for cell in cells):
        out.print("Budgets are shares of the tokens, so bytes differ: see ratio, or give 10%bytes to hold them equal.")


def _bench(folder: str) -> list[Aggregate]:
    from keepkv.evaluation.rows import ITEMS, ItemRow
    from keepkv.evaluation.vision import aggregates
    from keepkv.measure.files import read_rows

    return aggregates(read_rows(Path(folder).expanduser(), ITEMS, ItemRow))


def _show_bench(found: list[Aggregate]) -> None:
    out = console()
    for mode, length in dict.fromkeys((one.mode, one.length) for one in found):
        made = table("method", "budget", "entries", "of all", "OP", "OL", "loyalty", "95 %")
        for one in found:
            if (one.mode, one.length) == (mode, length):
                loyal = one.loyalty
                said = loyal and (f"{loyal.macro:.1f}", f"{loyal.micro:.1f}", f"{loyal.low:.0f} … {loyal.high:.0f}")
                made.add_row(
                    one.method, str(one.budget), "" if one.entries is None else f"{one.entries:.0f}",
                    _number(one.share), _number(one.performance), *(said or ("", "", "")),
                )  # fmt: skip
        out.print(f"\n[bold]all tasks[/bold], {length} tokens, {mode}")
        out.print(made)
    if found:
        out.print("entries: cached in a layer, mean. OP: √ of the mean squared ratio to the full cache's scores.")
        out.print("loyalty: replies that are the full cache's, per cent. OL: the mean of the tasks' loyalties.")
        lost = sorted({name for one in found for name in one.left_out})
        if lost:
            out.print(f"Without a ratio, as the full cache scores 0: {', '.join(lost)}.")


def _number(value: float | None, sign: str = "") -> str:
    return "failed" if value is None else f"{value:{sign}.3f}"


def _span(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.2f} … {high:.2f}"
