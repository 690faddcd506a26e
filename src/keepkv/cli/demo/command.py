"""``keepkv demo``: several methods on one document, side by side."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from keepkv.cli.load import load
from keepkv.cli.options import AsJson, Budget, Device, Import, Methods, Model, Texts
from keepkv.cli.output import console, one_line_errors, print_json, progress
from keepkv.cli.small_model import for_own_text
from keepkv.errors import KeepKVError

if TYPE_CHECKING:
    from keepkv.cli.demo.material import Material
    from keepkv.cli.demo.measure import Compared

METHODS = (
    "random", "streaming-llm", "snapkv", "expected-attention", "adakv", "keydiff", "compactor", "keepkv",
    "keepkv:key=zip", "keepkv2", "kvzip",
)  # fmt: skip


@one_line_errors
def demo(
    document: Annotated[str | None, Option(help="Your own text file; - for stdin.")] = None,
    model: Model = None,
    question: Annotated[Texts, Option("--question", "-q", help="About your text. Repeatable.")] = None,
    method: Methods = None,
    budget: Budget = "0.1",
    max_new_tokens: Annotated[int, Option(min=1, help="Length of a reply, with your own text or model.")] = 24,
    seed: Annotated[int, Option(help="Another seed weaves other facts into the shipped document.")] = 0,
    device: Device = "auto",
    imports: Import = None,
    as_json: AsJson = False,
) -> None:
    """Compress a document once per method, before any question is seen, then ask.

    Without arguments: a real document with facts woven in, and a small model; both are in the package. That model
    reads nothing else: for your own document give --model, or install the small real one that the command names.

    \b
    Examples:
      keepkv demo
      keepkv demo --budget 0.2 --method snapkv --method keepkv:key=zip
      keepkv demo --document report.txt --question "Who wrote it?"
      keepkv demo --document report.txt --model Qwen/Qwen3-0.6B --json
    """
    from keepkv.cli import arguments
    from keepkv.cli.demo.material import own, shipped
    from keepkv.cli.demo.measure import measure
    from keepkv.cli.demo.show import show

    if question and document is None:
        raise KeepKVError("--question is about a text of your own: give it with --document FILE")
    variants = [arguments.variant(text) for text in method or METHODS]
    arguments.budget(budget, variants)  # refused before anything is loaded
    text = None if document is None else arguments.read_text(document)
    if text is not None:
        model = for_own_text(model, "--document")
    network, tokenizer = load(model, device)
    if text is None:
        material = shipped(tokenizer, network, seed)
    else:
        material = own(tokenizer, network, text, question or [])
    is_plain = model is None  # the embedded model replies with exactly the answer
    with progress(2 + len(variants)) as step:
        rows = measure(
            network,
            tokenizer,
            material.context,
            material.asked,
            [one for one in variants if one.method != "full"],
            budget,
            reply_tokens=None if is_plain else max_new_tokens,
            step=step,
        )
    if as_json:
        print_json(_as_dict(material, rows, budget))
    else:
        show(console(), material, rows, budget)


def _as_dict(material: Material, rows: list[Compared], budget: str) -> dict[str, Any]:
    from keepkv.cli.demo.strip import cells

    return {
        "tokens": len(material.context),
        "budget": budget,
        "questions": [asdict(one) for one in material.asked],
        "rows": [
            {
                "method": row.label,
                "right": row.right,
                "asked": len(row.replies),
                "agreement": row.agreement,
                "kl": row.kl,
                "prefill_tokens_per_second": row.prefill_per_second,
                "decode_tokens_per_second": row.decode_per_second,
                "replies": [asdict(reply) for reply in row.replies],
                "receipt": row.receipt.to_dict(),
                "survival": cells(row.survival, 64),
            }
            for row in rows
        ],
    }
