"""``keepkv layers``: which layers and heads a compression starves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from keepkv.cli.load import load
from keepkv.cli.options import AsJson, Device, Import, Methods, Model, Texts
from keepkv.cli.output import console, one_line_errors, plus_minus, print_json, progress, table
from keepkv.core.words import counted
from keepkv.errors import KeepKVError

if TYPE_CHECKING:
    from keepkv.evaluation.fidelity import LayersRow
    from keepkv.evaluation.fidelity.rows import GivenBack

METHODS = ("auto", "keepkv2")
OWN_TASK, TASK = "niah-multikey-1", "notes"  # what the model in the package was trained on; what others can read


@one_line_errors
def layers(
    model: Model = None,
    task: Annotated[
        str | None, Option("--task", "-t", help="Task whose questions are asked, see `keepkv tasks`.")
    ] = None,
    text: Annotated[str | None, Option(help="Text file that is read on instead; - for stdin.")] = None,
    method: Methods = None,
    budget: Annotated[
        Texts,
        Option(
            "--budget", "--budgets", "-b", help="Share of the tokens (0.2), slots per head (512) or bytes. Repeatable."
        ),
    ] = None,
    length: Annotated[int, Option("--length", "-l", min=1, help="Tokens of a context that is compressed.")] = 1024,
    after: Annotated[int, Option("--continue", min=1, help="With --text: tokens behind a context.")] = 128,
    items: Annotated[int, Option(min=1, help="Contexts.")] = 4,
    heads: Annotated[
        list[int] | None, Option(metavar="LAYER", help="Give back each KV head of this layer too. Repeatable.")
    ] = None,
    seed: Annotated[int, Option(help="Random seed; each has contexts of its own.")] = 0,
    device: Device = "auto",
    out: Annotated[str | None, Option(help="Directory for layers.jsonl and layers.csv.")] = None,
    imports: Import = None,
    as_json: AsJson = False,
) -> None:
    """Find the layers and heads that a compression starves.

    Each layer of a compressed cache is given all its slots back, alone, and what is left of the KL to the full cache is
    measured over right answers to questions on the context, or over a text that goes on. One that half of the KL goes
    away with carries it; it is starved if it also holds no larger share of its slots than the layers do on average.

    \b
    Examples:
      keepkv layers
      keepkv layers --method keepkv2 --budget 0.1 --heads 2
      keepkv layers --model Qwen/Qwen3-0.6B --method snapkv --budget 0.3 --out results
      keepkv layers --text report.txt --model Qwen/Qwen3-0.6B --json
    """
    from keepkv.cli import arguments
    from keepkv.core.budget import Budget
    from keepkv.evaluation.fidelity.layers import by_layer, steps
    from keepkv.evaluation.fidelity.passages import of_task, of_text
    from keepkv.measure.files import folder, write
    from keepkv.tasks.length import check_tokens

    variants = [arguments.variant(one) for one in method or METHODS]
    budgets = list(dict.fromkeys(Budget.of(one) for one in budget or ("0.2",)))
    if text is not None and task is not None:
        raise KeepKVError("--task asks questions and --text reads on: give one of them")
    words = None if text is None else arguments.read_text(text)
    into = None if out is None else folder(out)
    network, tokenizer = load(model, device)
    check_tokens(network, length, "a context")
    if words is None:
        name = task or (OWN_TASK if model is None else TASK)
        behind, read = f"the questions of {name}", of_task(tokenizer, name, length, items, seed, model is not None)
    else:
        behind, read = f"{after} tokens that follow", of_text(tokenizer, words, length, items, after)
    label, rows = "embedded" if model is None else model, []
    with progress(len(budgets) * len(variants) * steps(network, read, heads or ())) as step:
        for at in budgets:
            for one in variants:
                rows.append(by_layer(network, read, one, at, heads=heads or (), seed=seed, name=label, step=step))
    written = [] if into is None else write(rows, into, "layers")
    if as_json:
        print_json([row.to_dict() for row in rows])
        return
    _show(rows, behind, length)
    for path in written:
        typer.echo(f"wrote {path}")


def _show(rows: list[LayersRow], behind: str, length: int) -> None:
    out = console()
    texts = f"{counted(rows[0].passages, 'context')} of {counted(length, 'token')}"
    out.print(f"{rows[0].made_with.model}: {texts}, KL over {behind}.")
    for row in rows:
        out.print(
            f"\n[bold]{row.label}[/bold], budget {row.budget}: KL {plus_minus(row.kl, digits=4)}, all given back "
            f"{row.whole.mean:.2g}"
        )
        made = table("given back", "held", "KL left", "accounts for", "")
        for one in row.layers:
            made.add_row(f"layer {one.layer}", *_cells(one))
            for head in row.heads:
                if head.layer == one.layer:
                    made.add_row(f"  head {head.head}", *_cells(head))
        out.print(made)
    out.print("\nheld: share of its slots that it has. KL left: full ‖ compressed, in nats, with it given back.")
    out.print("accounts for: share of the KL that is gone then. carries: half of it or more.")
    out.print("starved: carries it, and holds no larger share than the layers do on average.")


def _cells(one: GivenBack) -> list[str]:
    mark = "starved" if one.starved else "carries" if one.carries else ""
    return [f"{one.held:.0%}", plus_minus(one.kl, digits=4), f"{one.accounts:.0%}", mark]
