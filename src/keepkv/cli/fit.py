"""``keepkv fit``: whether a context fits a memory, and what to set."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

from keepkv.cli.options import AsJson, Codec, CodecOption, Texts
from keepkv.cli.output import console, one_line_errors, print_json, table

Text = str | None


@one_line_errors
def fit(
    model: Annotated[str, Option(help="Folder with config.json, that file, or a Hub name. No weights are read.")],
    context: Annotated[str, Option("--context", "-c", help="Tokens of the prompt: 131072, 128k or 1M.")],
    budget: Annotated[
        str, Option("--budget", "-b", help="Share of the tokens (0.1), slots per head (512) or bytes (64MiB).")
    ] = "0.2",
    method: Annotated[str, Option("--method", "-m", help="NAME or NAME:key=value,key=value.")] = "auto",
    batch: Annotated[int, Option(min=1, help="Prompts that are read at once.")] = 1,
    memory: Annotated[Text, Option(help="What there is, such as 24GiB; this machine's GPU or RAM if absent.")] = None,
    chunk: Annotated[Text, Option(help="Tokens that are read at once; 8192, or what fits, if absent.")] = None,
    store: Annotated[Text, Option(help="How slots lie in memory: auto, dense, ragged or static.")] = None,
    codec: Codec = None,
    store_option: Annotated[Texts, Option(help="key=value of the store, such as capacity=8192. Repeatable.")] = None,
    codec_option: CodecOption = None,
    dtype: Annotated[Text, Option(help="float32, bfloat16 or float16; the configuration's if absent.")] = None,
    weights: Annotated[Text, Option(help="What quantised weights take, such as 5GiB.")] = None,
    device: Annotated[Text, Option(help="cuda or cpu; cpu only where --memory and a GPU are absent.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a context fits your memory, and what to set. Only the model's configuration is read.

    \b
    Examples:
      keepkv fit --model Qwen/Qwen3-8B --context 128k --memory 24GiB
      keepkv fit --model ./my-model --context 1M --budget 0.1 --method keepkv2
      keepkv fit --model ./my-model --context 32k --batch 8 --codec int4 --json
    """
    from keepkv.cli.arguments import of_piece, variant
    from keepkv.plan.answer import fit as find

    chosen = variant(method, [*of_piece("store", store, store_option), *of_piece("codec", codec, codec_option)])
    free = ("seed", "select", "selected", "select_options")  # no memory depends on them
    options = {name: x for name, x in chosen.options.items() if name not in free}
    found = find(
        model, context, budget=budget, method=chosen.method, batch=batch, memory=memory, chunk=chunk, dtype=dtype,
        weights=weights, device=device, **options,
    )  # fmt: skip
    if as_json:
        print_json(found.to_dict())
    else:
        out = console()
        out.print(found.sentence, markup=False)
        out.print()
        for lines, left, heads in ((found.head(), 2, False), (found.table(), 1, True)):
            shown = table(*(lines[0] if heads else ("", "")), left=left)
            shown.show_header = heads
            for line in lines[heads:]:
                shown.add_row(*line)
            out.print(shown, markup=False)
            out.print()
        out.print("Set this:", markup=False)
        typer.echo("\n".join(f"  {line}" for line in found.python.splitlines()))
        if found.command:
            typer.echo(f"or\n  {found.command}")
    if found.memory is not None and not found.fits:
        raise typer.Exit(1)
