"""From what a client asks of keepkv to what the engine is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keepkv.errors import SpanError
from keepkv.serve.http.errors import Refused
from keepkv.serve.http.shapes.asked import KeepKV, SpanAsked
from keepkv.serve.http.shapes.prompts import Chat, Prompt
from keepkv.serve.request import Compression
from keepkv.spans import Span, spans_of_chat, spans_of_text


def compression_of(asked: KeepKV, spans: tuple[Span, ...] | None = None) -> Compression | None:
    """What is asked, or None where nothing is; raises ``KeepKVError`` where it cannot be read."""
    if "calibration" in asked.options:
        raise Refused(400, "options: a calibration is a file of the server, not a client's to name")
    if not asked.says:
        return None
    return Compression(asked.method, asked.options, asked.budget, asked.codec, spans, asked.every)


def spans_of(
    asked: Sequence[SpanAsked] | None,
    tokenizer: Any,
    prompt: Prompt,
    *,
    messages: Chat = (),
    template: Mapping[str, Any] | None = None,
    special: bool = False,
) -> tuple[Span, ...] | None:
    """``asked`` over the tokens of ``prompt``. messages, template: it was rendered from, for spans of a role; special:
    whether it begins with special tokens that are not in its text. Raises ``SpanError`` where one is not in the
    document."""
    if not asked:
        return None
    ranges: dict[str, Span] = {}
    roles: dict[str, str] = {}
    for i, one in enumerate(asked):
        name = one.name or f"span {i + 1}"
        if one.role is not None:
            roles[one.role] = one.mode
        elif name in ranges:
            raise SpanError(f"two spans have the name {name!r}")
        else:
            ranges[name] = Span(*_range(prompt, one, name), one.mode, one.weight, one.min_keep, name)
    if prompt.plain:
        found = list(ranges.values())
    else:
        found = list(spans_of_text(tokenizer, prompt.text, ranges, add_special_tokens=special)) if ranges else []
    if late := [one for one in found if one.end > prompt.split]:
        raise SpanError(f"span {late[0].label!r} reaches beyond the document, of {prompt.split:,} tokens")
    if roles and not messages:
        raise SpanError("a span by role is of messages, and there are none: give its text, or start and end")
    if roles:
        of_roles = spans_of_chat(tokenizer, messages, roles, **(template or {}))
        held = [one for one in of_roles if one.end <= prompt.split]
        if not held:
            raise SpanError(f"the document has no message of the roles {sorted(roles)}")
        found += held
    return tuple(found)


def _range(prompt: Prompt, one: SpanAsked, name: str) -> tuple[int, int]:
    """Where a span stands in the document, in characters, or in tokens of a prompt that is token ids."""
    if one.text is not None:
        document = prompt.text[: prompt.cut]
        if prompt.plain or document.count(one.text) != 1:
            times = "is no text" if prompt.plain else f"has its text {document.count(one.text)} times"
            raise SpanError(f"{name}: the document {times}; give start and end")
        return document.index(one.text), document.index(one.text) + len(one.text)
    start, end = one.start or 0, one.end or 0
    if not start < end <= prompt.cut:
        unit = "tokens" if prompt.plain else "characters"
        raise SpanError(f"{name}: {start}:{end} does not lie in a document of {prompt.cut:,} {unit}")
    return start, end
