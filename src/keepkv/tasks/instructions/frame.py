"""How a system text, a user's turn and the start of a reply are put together for a model."""

from __future__ import annotations

from typing import Any

from keepkv.tasks.chat import Frame

_SYSTEM, _USER = "[[system text]]", "[[user text]]"


PLAIN = Frame("", "\n\nUser: ", "\nAssistant:", " ", "\n\nUser:")


def frame_of(tokenizer: Any) -> Frame:
    """The frame of a tokenizer's chat template, or plain headers where it has none.

    Where a template has no system role, the system text opens the user's turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        return PLAIN
    system, user = {"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}
    merged = {"role": "user", "content": f"{_SYSTEM}\n\n{_USER}"}
    text = _render(tokenizer, [system, user])
    if text is None or _SYSTEM not in text:
        text = _render(tokenizer, [merged])
    if text is None or text.count(_SYSTEM) != 1 or text.count(_USER) != 1 or text.index(_SYSTEM) > text.index(_USER):
        return PLAIN
    head, rest = text.split(_SYSTEM)
    between, tail = rest.split(_USER)
    return Frame(head, between, tail)


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
    """The template's text, or None where it refuses these roles."""
    from jinja2.exceptions import TemplateError

    try:
        # Templates that do not know the switch ignore it; those that do would begin the reply with reasoning.
        made: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except TemplateError:
        return None
    return made
