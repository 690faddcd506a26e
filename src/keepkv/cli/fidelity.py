"""``keepkv fidelity``: what compression changes, against the full cache on the same text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from keepkv.cli.load import load
from keepkv.cli.options import AsJson, Device, Import, Model, Texts
from keepkv.cli.output import console, one_line_errors, plus_minus, print_json, progress, table
from keepkv.errors import KeepKVError

if TYPE_CHECKING:
    from keepkv.evaluation.fidelity import FidelityRow
    from keepkv.measure.interval import Estimate

METHODS = ("streaming-llm", "expected-attention", "auto", "keepkv")
BUDGETS = ("0.1", "0.25")


@one_line_errors
def fidelity(
    text: Annotated[str | None, Option(help="Text file; - for stdin; the shipped document if absent.")] = None,
    model: Model = None,
    method: Annotated[
        Texts, Option("--method", "--methods", "-m", help="NAME or NAME:key=value,key=value. Repeatable.")
    ] = None,
    budget: Annotated[
        Texts,
        Option(
            "--budget", "--budgets", "-b", help="Share of the tokens (0.1), slots per head (512) or bytes. Repeatable."
        ),
    ] = None,
    segments: Annotated[int, Option(min=1, help="Stretches of the text, each a sample.")] = 8,
    context: Annotated[int, Option(min=1, help="Tokens of a segment that are compressed.")] = 384,
    after: Annotated[int, Option("--continue", min=1, help="Tokens after them, teacher-forced.")] = 128,
    greedy: Annotated[int, Option(min=1, help="Tokens of a greedy reply, at most.")] = 32,
    seed: Annotated[int, Option(help="Random seed.")] = 0,
    device: Device = "auto",
    out: Annotated[str | None, Option(help="Directory for fidelity.jsonl and fidelity.csv.")] = None,
    imports: Import = None,
    as_json: AsJson = False,
) -> None:
    """Compare compressed caches with the full cache on the same text. No labels are needed.

    Each segment's context is compressed once, then its continuation is read from both caches. The full cache,
    random and snapkv are always measured beside what is asked for.

    \b
    Examples:
      keepkv fidelity
      keepkv fidelity --text report.txt --model Qwen/Qwen3-0.6B --budget 0.2
      keepkv fidelity -m keepkv -m keepkv:key=zip -b 0.1 -b 0.5 --out results
      keepkv fidelity --segments 4 --context 800 --continue 200 --json
    """
    from keepkv.cli import arguments
    from keepkv.core.budget import Budget
    from keepkv.evaluation.fidelity import fidelity as measure
    from keepkv.evaluation.fidelity.segments import cut, tokenise
    from keepkv.evaluation.setup import BASELINES
    from keepkv.measure.files import folder, write
    from keepkv.tasks.text import document

    variants = [arguments.variant(one) for one in method or METHODS]
    budgets = [Budget.of(one) for one in budget or BUDGETS]
    words = document() if text is None else arguments.read_text(text)
    if not words.strip():
        raise KeepKVError("the text is empty")
    into = None if out is None else folder(out)
    network, tokenizer = load(model, device)
    ids, start = tokenise(tokenizer, words)
    samples = cut(ids, segments, context + after, start)
    names = {*BASELINES, *(one.label for one in variants)} - {"full"}
    with progress(segments * (2 + len(names) * len(set(budgets)))) as step:
        rows = measure(
            network,
            samples,
            [(one.method, one.options) for one in variants],
            budgets,
            context=context,
            greedy=greedy,
            seed=seed,
            name="embedded" if model is None else model,
            step=step,
        )
    written = [] if into is None else write(rows, into, "fidelity")
    if as_json:
        print_json([row.to_dict() for row in rows])
        return
    _show(rows)
    for path in written:
        typer.echo(f"wrote {path}")


def _show(rows: list[FidelityRow]) -> None:
    (full, *_), out = rows, console()
    out.print(
        f"{full.made_with.model}: {full.segments} segments, {full.context} tokens compressed, {full.continuation} "
        f"teacher-forced, replies of {full.greedy} at most."
    )
    for budget in dict.fromkeys(row.budget for row in rows if row.method != "full"):
        out.print(f"\nbudget {budget}")
        made = table("method", "ratio", "KL", "top-1", "error", "prefix", "loyalty")
        for row in rows:
            if row.budget == budget or row.method == "full":
                made.add_row(row.label, f"{row.ratio:.3f}", *_cells(row.metrics))
        out.print(made)
    out.print("\n± is half of a 95 % interval over the segments.")
    out.print("KL: full ‖ compressed, nats. top-1: the same most likely next token.")
    out.print("error: ‖o′−o‖/‖o‖ of each layer's attention alone, at the full cache's queries.")
    out.print("prefix: tokens of a greedy reply before it differs. loyalty: replies that never do.")


def _cells(found: dict[str, Estimate]) -> list[str]:
    wide = [plus_minus(found["kl"]), plus_minus(found["top1"], 100, 1) + "%", plus_minus(found["output_error"])]
    return [*wide, f"{found['prefix'].mean:.1f}", f"{found['loyalty'].mean:.0%}"]
