"""Where the text of a prompt goes for a model that is talked to through a chat template."""

from dataclasses import dataclass
from typing import Any

_DOCUMENT, _QUESTION = "<<document>>", "<<question>>"
_SYSTEM, _USER = "[[system text]]", "[[user text]]"


@dataclass(frozen=True)
class Frame:
    """What stands before the context, between context and question, and after the question; all empty without a
    template. lead: what a reply starts with; stop: text that ends it."""

    before: str = ""
    between: str = ""
    end: str = ""
    lead: str = ""
    stop: str = ""


PLAIN = Frame("", "\n\nUser: ", "\nAssistant:", " ", "\n\nUser:")


def frame(tokenizer: Any) -> Frame:
    """What the tokenizer's chat template puts around the context and question of a user's turn."""
    if not getattr(tokenizer, "chat_template", None):
        return Frame()
    chat = [{"role": "user", "content": _DOCUMENT + _QUESTION}]
    whole = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    before, _, rest = whole.partition(_DOCUMENT)
    between, _, end = rest.partition(_QUESTION)
    return Frame(before, between, end)


def frame_of(tokenizer: Any) -> Frame:
    """What the chat template puts around a system text, a user's turn and a reply, or plain headers where it has none.

    Where a template has no system role, the system text opens the user's turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        return PLAIN
    system, user = {"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}
    merged = {"role": "user", "content": f"{_SYSTEM}\n\n{_USER}"}
    text = render(tokenizer, [system, user])
    if text is None or _SYSTEM not in text:
        text = render(tokenizer, [merged])
    if text is None or text.count(_SYSTEM) != 1 or text.count(_USER) != 1 or text.index(_SYSTEM) > text.index(_USER):
        return PLAIN
    head, rest = text.split(_SYSTEM)
    between, tail = rest.split(_USER)
    return Frame(head, between, tail)


def render(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
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
