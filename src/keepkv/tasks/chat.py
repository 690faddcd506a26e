"""Where the text of a prompt goes for a model that is talked to through a chat template."""

from dataclasses import dataclass
from typing import Any

_DOCUMENT, _QUESTION = "<<document>>", "<<question>>"


@dataclass(frozen=True)
class Frame:
    """What stands before the context, between context and question, and after the question; all empty without a
    template. lead: what a reply starts with; stop: text that ends it."""

    before: str = ""
    between: str = ""
    end: str = ""
    lead: str = ""
    stop: str = ""


def frame(tokenizer: Any) -> Frame:
    """What the tokenizer's chat template puts around the context and question of a user's turn."""
    if not getattr(tokenizer, "chat_template", None):
        return Frame()
    chat = [{"role": "user", "content": _DOCUMENT + _QUESTION}]
    whole = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    before, _, rest = whole.partition(_DOCUMENT)
    between, _, end = rest.partition(_QUESTION)
    return Frame(before, between, end)
