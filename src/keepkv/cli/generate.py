"""``keepkv generate``: one answer from a compressed cache, and its receipt."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Annotated, Any

import typer
from typer import Option

from keepkv.cli.options import Budget, Codec, CodecOption, Device, Import, Model, Select, Selected, SelectOption, Texts
from keepkv.cli.output import one_line_errors, print_json, waiting
from keepkv.cli.small_model import NAME, OFFER
from keepkv.errors import KeepKVError

UNFINISHED = "The answer is unfinished; the same command starts anew."
EMBEDDED = (
    "note: without --model the model in the package answers. It is tiny and reads only texts of keepkv's own tasks. "
    f"For your own text give --model DIRECTORY or --model NAME; {OFFER}, and give --model {NAME}."
)


@one_line_errors
def generate(
    prompt: Annotated[str | None, Option(help="The prompt.")] = None,
    prompt_file: Annotated[str | None, Option(help="File that holds the prompt; - for stdin.")] = None,
    system: Annotated[str | None, Option(help="System message in front of the prompt, for chat models.")] = None,
    chat: Annotated[
        bool | None, Option("--chat/--no-chat", help="Use the model's chat template; the default where it has one.")
    ] = None,
    model: Model = None,
    method: Annotated[
        str | None, Option("--method", "-m", help="NAME or NAME:key=value,key=value; auto if absent.")
    ] = None,
    budget: Budget = "0.1",
    option: Annotated[
        Texts, Option("--option", "-o", help="key=value of the method, or when.every=64. Repeatable.")
    ] = None,
    codec: Codec = None,
    codec_option: CodecOption = None,
    select: Select = None,
    selected: Selected = None,
    select_option: SelectOption = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Length of the answer at most.")] = 128,
    temperature: Annotated[
        float | None, Option(min=0, help="Draw tokens at this temperature; the likeliest ones if absent or 0.")
    ] = None,
    top_p: Annotated[float | None, Option(min=0, max=1, help="Draw from the likeliest tokens of this share.")] = None,
    top_k: Annotated[int | None, Option(min=1, help="Draw from so many of the likeliest tokens.")] = None,
    seed: Annotated[int, Option(min=0, help="Random seed.")] = 0,
    chunk: Annotated[
        int | None, Option(min=1, help="Tokens of the prompt read at once, which bounds the memory; all if absent.")
    ] = None,
    dtype: Annotated[str, Option(help="auto (as the model was saved), float32, bfloat16 or float16.")] = "auto",
    device: Device = "auto",
    device_map: Annotated[
        str | None, Option(help="auto, balanced …: spread the model over devices, as transformers does.")
    ] = None,
    raw: Annotated[bool, Option("--raw", hidden=True, help="The former name of --no-chat.")] = False,
    imports: Import = None,
    as_json: Annotated[bool, Option("--json", help="JSON on stdout: the text and the receipt.")] = False,
) -> None:
    """Answer a prompt with a compressed cache: the text streams to stdout, then the receipt.

    \b
    Examples:
      keepkv generate --model Qwen/Qwen3-0.6B --prompt-file report.txt --budget 20%
      keepkv generate --model Qwen/Qwen3-0.6B --prompt-file report.txt -m snapkv -b 1024 --chunk 2048
      keepkv generate --model Qwen/Qwen3-0.6B --prompt-file report.txt -b 10%bytes --codec int4
      keepkv generate --model Qwen/Qwen3-0.6B --prompt-file a.txt -m full --codec int4 --select codes --selected 512
      keepkv generate --model ./my-model --prompt "A story:" --temperature 0.7 -o when.every=64 --json
    """
    import torch

    import keepkv
    from keepkv.cli import arguments
    from keepkv.cli.load import load
    from keepkv.engine.versions import CACHE
    from keepkv.methods.presets import DEFAULT
    from keepkv.tasks.length import check_text, check_tokens

    if (prompt is None) == (prompt_file is None):
        raise KeepKVError("give the prompt with either --prompt TEXT or --prompt-file FILE")
    more = [*(option or []), *arguments.of_piece("codec", codec, codec_option)]
    more += arguments.of_piece("select", select, select_option) + ([] if selected is None else [f"selected={selected}"])
    chosen = arguments.variant(method or DEFAULT, more)
    asked = arguments.budget(budget, [chosen])
    text = arguments.read_text(prompt_file) if prompt_file is not None else str(prompt)
    network, tokenizer = load(model, device, dtype=dtype, device_map=device_map)
    if model is None:
        print(EMBEDDED, file=sys.stderr)
    check_text(tokenizer, network, text, "the prompt")
    inputs = _inputs(tokenizer, text, system, False if raw else chat).to(network.device)
    tokens = inputs["input_ids"].shape[1]
    check_tokens(network, tokens, "the prompt", max_new_tokens)
    cache = keepkv.Cache(network, chosen.method, asked, **{"seed": seed, **chosen.options})
    drawing = _drawing(temperature, top_p, top_k)
    torch.manual_seed(seed)
    with ExitStack() as reading:
        reading.enter_context(waiting(f"reading {tokens:,} tokens", UNFINISHED))
        out = network.generate(
            **inputs, **{CACHE: cache}, **drawing, max_new_tokens=max_new_tokens, prefill_chunk_size=chunk,
            streamer=None if as_json else _Streamer(tokenizer, begins=reading.close),
        )  # fmt: skip
    if as_json:
        answer = tokenizer.decode(out[0, tokens:], skip_special_tokens=True)
        print_json({"text": answer, "receipt": cache.report().to_dict()})
    else:
        typer.echo(f"\n{cache.report()}")


def _inputs(tokenizer: Any, text: str, system: str | None, chat: bool | None) -> Any:
    if (chat or (system is not None and chat is not False)) and not tokenizer.chat_template:
        raise KeepKVError("this model has no chat template, which --chat and --system need: leave them out")
    if system is not None and chat is False:
        raise KeepKVError("--system is part of a chat: leave out --system or --no-chat")
    if tokenizer.chat_template and chat is not False:
        said = [] if system is None else [{"role": "system", "content": system}]
        said.append({"role": "user", "content": text})
        found = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        found = tokenizer(text, return_tensors="pt")
    if not text or found["input_ids"].shape[1] == 0:
        raise KeepKVError("the prompt is empty")
    return found


def _drawing(temperature: float | None, top_p: float | None, top_k: int | None) -> dict[str, Any]:
    """How ``generate`` chooses tokens: the likeliest ones unless something was asked for."""
    if temperature == 0 or (temperature, top_p, top_k) == (None, None, None):
        return {"do_sample": False}
    asked = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    return {"do_sample": True, **{name: x for name, x in asked.items() if x is not None}}


class _Streamer:
    """Prints tokens as they come, and says when the first one does: what is put before it is the prompt."""

    def __init__(self, tokenizer: Any, begins: Callable[[], None]) -> None:
        from transformers import TextStreamer

        self.printer, self.begins, self.reads = (
            TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            begins,
            True,
        )

    def put(self, value: Any) -> None:
        if not self.reads:
            self.begins()
        self.reads = False
        self.printer.put(value)

    def end(self) -> None:
        self.printer.end()
