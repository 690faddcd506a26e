"""Token spans from ranges of characters, or from the messages of a chat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from keepkv.errors import SpanError
from keepkv.spans.base import Span

Range = tuple[int, int] | str | Span


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers have it."""

    is_fast: bool

    def __call__(self, text: str, **options: Any) -> Any: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


class TokenSpans(list[Span]):
    """Spans of tokens. split: by name, the tokens that lie in their span only in part, such as one that holds the last
    letter of a range and the comma after it. A token belongs to a span if any of its characters does; where two fair
    ranges meet inside a token, to the earlier."""

    def __init__(self, spans: Iterable[Span], split: dict[str, list[int]]) -> None:
        super().__init__(spans)
        self.split = split


def spans_of_text(
    tokenizer: Tokenizer,
    text: str,
    ranges: Mapping[str, Range],
    mode: str = "fair",
    *,
    add_special_tokens: bool = True,
) -> TokenSpans:
    """Spans of ``text`` as ``tokenizer(text)`` makes tokens of it, one for each entry of ``ranges``, by name.

    A range is (start, end) in characters, a piece of the text that occurs in it once, or a ``Span`` in characters that
    has a mode and a weight of its own; ``mode`` is that of the others. ``min_keep`` counts tokens. Raises ``SpanError``
    where a range is not in the text or holds no token, and for a tokenizer that cannot say where its tokens come from.
    """
    wanted = {name: _characters(name, x, text, mode) for name, x in ranges.items()}
    return _tokens(_encode(tokenizer, text, add_special_tokens)["offset_mapping"], wanted, text)


def spans_of_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    modes: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
    **options: Any,
) -> TokenSpans:
    """Spans of the contents of the messages whose role is in ``modes``, as the tokenizer's chat template renders them.

    modes: role → "fair", "protect" or "default". ``options`` go to ``apply_chat_template``. A span is named after its
    role, numbered ("user 1", "user 2") where there are several. Each content is found by rendering the chat again with
    a mark in its place, and the tokens are those of the rendered text. Raises ``SpanError`` where a template rewrites,
    repeats or drops a content, or where the text gives other tokens than the template.
    """
    options = {"add_generation_prompt": add_generation_prompt, **options}
    chat = [dict(message) for message in messages]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False, **options))
    roles = [str(message.get("role")) for message in chat]
    if unknown := set(modes) - set(roles):
        raise SpanError(f"modes for {sorted(unknown)}: the roles of these messages are {sorted(set(roles))}")
    counts, so_far, wanted = Counter(roles), Counter[str](), {}
    for i, role in enumerate(roles):
        so_far[role] += 1
        name = role if counts[role] == 1 else f"{role} {so_far[role]}"
        content = chat[i].get("content")
        if role in modes and content and not (isinstance(content, str) and content.isspace()):
            start, end = _content(tokenizer, chat, i, text, options)
            wanted[name] = Span(start, end, modes[role], name=name)
    encoded = _encode(tokenizer, text, add_special_tokens=False)
    direct: Any = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **options)
    if list(direct["input_ids"]) != list(encoded["input_ids"]):
        raise SpanError(
            "the rendered chat gives other tokens as a text than through apply_chat_template, so no position in it can "
            "be trusted. Render it with apply_chat_template(tokenize=False) and use spans_of_text on that."
        )
    return _tokens(encoded["offset_mapping"], wanted, text)


def _characters(name: str, given: Range, text: str, mode: str) -> Span:
    """A range as a ``Span`` in characters that lies in ``text``."""
    if isinstance(given, str):
        if not given or text.count(given) != 1:
            raise SpanError(
                f"range {name!r}: {given!r} occurs {text.count(given)} times in the text; give (start, end)"
            )
        given = (text.index(given), text.index(given) + len(given))
    if not isinstance(given, Span):
        try:
            start, end = given
        except (TypeError, ValueError):
            raise SpanError(
                f"range {name!r}: {given!r}; expected (start, end), a piece of the text, or a keepkv.Span"
            ) from None
        given = Span(start, end, mode)
    if given.end > len(text):
        raise SpanError(
            f"range {name!r}: {given.start}:{given.end} ends beyond the text, which has {len(text)} characters"
        )
    return replace(given, name=name)


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> Any:
    if not tokenizer.is_fast:
        raise SpanError(
            f"{type(tokenizer).__name__} cannot say which characters a token comes from. Load the fast tokenizer "
            "(AutoTokenizer, use_fast=True), or give keepkv.Span in tokens."
        )
    return tokenizer(text, return_offsets_mapping=True, add_special_tokens=add_special_tokens)


def _tokens(offsets: Sequence[tuple[int, int]], wanted: Mapping[str, Span], text: str) -> TokenSpans:
    """Spans in characters as spans in tokens. Special tokens come from no character and belong to none."""
    made: list[Span] = []
    split: dict[str, list[int]] = {}
    last: Span | None = None  # the fair span before, in characters, and where its tokens end
    behind = 0
    for name, span in sorted(wanted.items(), key=lambda entry: entry[1].start):
        mine = [i for i, (start, end) in enumerate(offsets) if start < span.end and end > span.start]
        if span.mode == "fair":
            if last is not None and last.end <= span.start:
                mine = [i for i in mine if i >= behind]
            last, behind = span, mine[-1] + 1 if mine else behind
        if not mine:
            raise SpanError(f"range {name!r}: no token comes from {text[span.start : span.end]!r}")
        made.append(replace(span, start=mine[0], end=mine[-1] + 1))
        if parts := [i for i in mine if offsets[i][0] < span.start or offsets[i][1] > span.end]:
            split[name] = parts
    return TokenSpans(made, split)


def _content(
    tokenizer: Tokenizer, chat: list[dict[str, Any]], index: int, text: str, options: dict[str, Any]
) -> tuple[int, int]:
    """Characters of ``text``, the rendered ``chat``, that are the content of one message, white space around it not."""
    message, content = f"message {index} ({chat[index].get('role')})", chat[index]["content"]
    remedy = "Render the chat with apply_chat_template(tokenize=False) and use spans_of_text on that."
    if not isinstance(content, str):
        raise SpanError(f"{message}: its content is a {type(content).__name__}, only text can be found. {remedy}")
    mark = "KeepKVMark"
    while mark in text:
        mark += "Z"
    marked = [{**x, "content": mark} if i == index else x for i, x in enumerate(chat)]
    try:
        pieces = str(tokenizer.apply_chat_template(marked, tokenize=False, **options)).split(mark)
    except Exception as error:
        raise SpanError(f"{message}: the chat template refuses another content there: {error}. {remedy}") from error
    if len(pieces) != 2:
        raise SpanError(f"{message}: the chat template renders its content {len(pieces) - 1} times. {remedy}")
    before, after = pieces
    start, end = len(before), len(text) - len(after)
    found = text[start:end]
    if not (text.startswith(before) and text.endswith(after)) or found.strip() != content.strip():
        raise SpanError(f"{message}: the chat template changes its content, or the text around it. {remedy}")
    return start + len(found) - len(found.lstrip()), start + len(found.rstrip())
