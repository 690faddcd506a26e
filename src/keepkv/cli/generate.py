"""``keepkv generate``: one answer from a compressed cache, and its receipt."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from transformers import TextStreamer
from typer import Option

import keepkv
from keepkv.cli import arguments
from keepkv.cli.load import load
from keepkv.cli.options import Budget, Device, Import, Model, Texts
from keepkv.cli.output import one_line_errors, print_json
from keepkv.engine.versions import CACHE
from keepkv.errors import KeepKVError
from keepkv.tasks.length import check_text, check_tokens


@one_line_errors
def generate(
    prompt: Annotated[str | None, Option(help="The prompt.")] = None,
    prompt_file: Annotated[str | None, Option(help="File that holds the prompt; - for stdin.")] = None,
    model: Model = None,
    method: Annotated[str, Option("--method", "-m", help="See `keepkv methods`.")] = "keepkv",
    budget: Budget = "0.1",
    option: Annotated[
        Texts, Option("--option", "-o", help="key=value of the method, or when.every=64. Repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Length of the answer at most.")] = 128,
    raw: Annotated[bool, Option("--raw", help="Leave out the model's chat template.")] = False,
    device: Device = "auto",
    imports: Import = None,
    as_json: Annotated[bool, Option("--json", help="JSON on stdout: the text and the receipt.")] = False,
) -> None:
    """Answer a prompt with a compressed cache: the text streams to stdout, then the receipt.

    \b
    Examples:
      keepkv generate --prompt-file report.txt --budget 0.2
      keepkv generate --model Qwen/Qwen3-0.6B -m snapkv -b 1024 --prompt-file a.txt
      keepkv generate --prompt "Once upon a time" --option when.every=64 --json
    """
    if (prompt is None) == (prompt_file is None):
        raise KeepKVError("give the prompt with either --prompt TEXT or --prompt-file FILE")
    text = arguments.read_text(prompt_file) if prompt_file is not None else prompt
    options = arguments.options(option or [], method)
    network, tokenizer = load(model, device)
    check_text(tokenizer, network, str(text), "the prompt")
    inputs = _inputs(tokenizer, str(text), raw).to(network.device)
    check_tokens(network, inputs["input_ids"].shape[1], "the prompt", max_new_tokens)
    cache = keepkv.Cache(network, method=method, budget=budget, **options)
    out = network.generate(
        **inputs,
        **{CACHE: cache},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    receipt = cache.report()
    if as_json:
        answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print_json({"text": answer, "receipt": receipt.to_dict()})
    else:
        typer.echo(f"\n{receipt}")


def _inputs(tokenizer: Any, text: str, raw: bool) -> Any:
    if tokenizer.chat_template and not raw:
        chat = [{"role": "user", "content": text}]
        found = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        found = tokenizer(text, return_tensors="pt")
    if not text or found["input_ids"].shape[1] == 0:
        raise KeepKVError("the prompt is empty")
    return found
