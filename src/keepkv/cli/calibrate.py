"""``keepkv calibrate``: what a method needs to know of a model, measured once and kept in a file."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from keepkv.cli.load import load
from keepkv.cli.options import AsJson, Device, Model, Texts
from keepkv.cli.output import one_line_errors, print_json, progress
from keepkv.errors import KeepKVError

if TYPE_CHECKING:
    from torch import Tensor


@one_line_errors
def calibrate(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="What to measure, such as query-statistics.")],
    out: Annotated[str, Option(help="File to write; replaced when everything is measured.")],
    model: Model = None,
    text: Annotated[Texts, Option(help="Text file; - for stdin. Repeatable; the shipped document if absent.")] = None,
    tokens: Annotated[int, Option(min=1, help="Tokens read in all, at most.")] = 20_000,
    length: Annotated[int, Option(min=2, help="Tokens read at a time; each piece starts anew.")] = 1024,
    option: Annotated[Texts, Option("--option", "-o", help="KEY=VALUE, an option of the kind. Repeatable.")] = None,
    source: Annotated[
        str | None, Option("--from", metavar="PATH", help="Weights that the authors published; nothing is measured.")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure something of a model on texts, for the methods that need it: a calibration.

    gates: what questions ask of a token, foretold from its key and value, for keepkv3. Everyday facts are put between
    the sentences of the texts, and the model answers questions on them. Options: noise; behind=text reads each text
    again instead, for replies that quote, behind=questions asks alone; both is the default.

    heads: what each KV head looks at while the model answers questions on needles, for surface-logic-kv, headkv and
    duo-attention; it prints how well two halves of the answers agree. Options: k, group, likely, seed; pattern=FILE
    reads a published profile instead, full_attention_heads.tsv of DuoAttention or a .npy of LU-KV.

    query-statistics: mean and covariance of the queries of each head, for expected-attention:statistics=stored. Give
    text like that which the model will read. The file fits this model only; another one is refused.

    q-filters: the main direction of the queries of each head, for q-filter. Option: published, a folder or file of the
    authors of Q-Filters, which is read instead of the texts.

    kvzap: what a second reading would attend to, foretold from hidden states, for kvzap and dms. It reads each text
    twice and fits a linear map of each layer (options: plus, noise); --from reads the networks that the authors
    published, a folder with model.safetensors. fast-kvzip: gates on hidden states, trained to foretell the same, or
    with --from those that its authors published, a .pt file (options: rank, anchors, steps, seed; behind=both asks
    questions as well).

    oscar: rotations of keys and values for the 2-bit codes of the codec oscar. Option: bits.
    tada: how alike KV heads are in each layer, whether their mean pays, and which layers get 2, 4 or 8 bits, for the
    codec tada. Options: bits (on average), mean, centre, proposals, seed. It reads the text often: give short pieces.

    sals: the leading directions of keys before RoPE, all heads of a token together, for the codec sals; it prints how
    much of the keys they say on text that was held out. Options: rank, weighted. loki: those of each head after RoPE,
    for the selection loki.

    triattention: mean queries of each head before RoPE, for triattention, from ordinary text.

    restore: tokens that read a whole text before it is compressed and stay beside what is kept, for
    keepkv.restore_slots, trained so that answers survive. Options: method, budgets, slots, rank, steps, rate, seed. It
    takes some hundred forwards and backwards. --from reads what authors published, a folder of PEFT.

    \b
    Examples:
      keepkv calibrate gates --model Qwen/Qwen3-0.6B --out gates.safetensors
      keepkv calibrate heads --model HuggingFaceTB/SmolLM2-135M-Instruct --tokens 60000 --out heads.safetensors
      keepkv calibrate kvzap --model Qwen/Qwen3-8B --from KVzap-mlp-Qwen3-8B --out kvzap.safetensors
      keepkv calibrate query-statistics --out queries.safetensors
      keepkv calibrate query-statistics --model Qwen/Qwen3-0.6B --text a.txt --text b.txt --out qwen3.safetensors
      keepkv calibrate query-statistics --text report.txt --tokens 100000 --length 4096 --out queries.safetensors --json
      keepkv calibrate q-filters --model Qwen/Qwen3-0.6B -o published=Qwen3-0.6B_qfilt --out filters.safetensors
      keepkv calibrate restore --tokens 40000 --length 800 -o method=keepkv2 -o steps=400 --out restore.safetensors
      keepkv calibrate tada --tokens 8192 --length 128 -o bits=4 --out tada.safetensors
      keepkv calibrate sals --tokens 65536 --length 512 --out sals.safetensors
      keepkv calibrate triattention --model Qwen/Qwen3-0.6B --text a.txt --out triattention.safetensors
    """
    from keepkv.calibrate import KINDS, asks, batches, hides, published, with_needles, with_questions
    from keepkv.calibrate import calibrate as measure
    from keepkv.cli import arguments
    from keepkv.measure.files import folder
    from keepkv.tasks.text import document

    kind = KINDS.named(kind)  # an unknown one is refused before a model is loaded
    path = folder(str(Path(out).expanduser().parent)) / Path(out).name
    words = [arguments.read_text(one) for one in text or []] or [document()]
    options = arguments.pairs(option or [])
    if source is not None and (text or option):
        raise KeepKVError("--from reads weights as they were published: leave --text and --option out")
    network, tokenizer = load(model, device)
    typed = _typed(kind, out, model, text or [], option or [], tokens, length, source)
    if source is not None:
        made = published(kind, network, source, typed)
    else:
        if asks(kind) and "asked" not in options:
            pieces, options["asked"] = with_questions(tokenizer, words, tokens, length)
        elif hides(kind) and not {"needles", "pattern"} & options.keys():
            pieces, options["needles"] = with_needles(tokenizer, words, tokens, length)
        else:
            pieces = batches(tokenizer, words, tokens, length)
        with progress(len(pieces)) as step:

            def watched() -> Iterator[Tensor]:
                for ids in pieces:
                    step("reading")
                    yield ids

            made = measure(kind, network, watched(), typed, **options)
    made.save(path)
    if as_json:
        facts = {"kind": kind, "out": str(path), "bytes": path.stat().st_size, "layers": list(made.tensors)}
        print_json(facts | {"digest": made.digest, "fingerprint": made.fingerprint, "made_with": made.made_with})
    else:
        for line in made.made_with.get("says", []):
            typer.echo(line)
        what = f"{made.made_with['tokens']} tokens" if source is None else source
        size = f"{path.stat().st_size / 1e6:.1f} MB"
        typer.echo(f"wrote {path} ({size}): {kind} of {len(made.tensors)} layers from {what}")


def _typed(
    kind: str, out: str, model: str | None, text: list[str], option: list[str], tokens: int, length: int,
    source: str | None,
) -> str:  # fmt: skip
    """The command that makes this file again."""
    words = ["keepkv", "calibrate", kind, *([] if model is None else ["--model", model])]
    if source is not None:
        return shlex.join([*words, "--from", source, "--out", out])
    words += [word for one in text for word in ("--text", one)] + [word for one in option for word in ("-o", one)]
    return shlex.join([*words, "--tokens", str(tokens), "--length", str(length), "--out", out])
