"""What stands around a document, a question and a reply: the chat template's text, or plain headers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keepkv.errors import KeepKVError
from keepkv.tasks.chat import render

_DOCUMENT, _QUESTION, _REPLY, _SYSTEM = "<<document>>", "<<question>>", "<<reply>>", "<<system>>"
_HEADER = "\n\nQuestion: "


@dataclass(frozen=True)
class Turns:
    """Text before the document, between it and the first question, between a question and its reply, and between a
    reply and the next question. stop: text that a reply ends before; None where the model has a token for that."""

    before: str
    first: str
    reply: str
    again: str
    stop: str | None = None

    def replied(self, text: str) -> str:
        """A reply's ``text`` as it follows a question, which a plain header leaves without a space."""
        return text if self.stop is None else f" {text}"

    def question(self, text: str, later: bool) -> str:
        """``text`` as the first question, or a later one, up to where its reply begins."""
        return (self.again if later else self.first) + text + self.reply


def turns_of(tokenizer: Any, system: str | None = None, chat: bool | None = None) -> Turns:
    """The turns of a tokenizer's chat template, or plain ones where it has none.

    system: text that stands before everything. A template without a system role gets it before the document. chat:
    whether to use the template; None: where there is one. Raises ``KeepKVError`` where it is asked for and missing, or
    cannot hold a document, a question and a reply.
    """
    has = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has:
        raise KeepKVError("chat=True, and the tokenizer has no chat template: leave chat out, or take a chat model")
    if not has or chat is False:
        lead = "" if system is None else system + "\n\n"
        return Turns(lead, _HEADER, "\nAnswer:", _HEADER, _HEADER.rstrip())
    asked = {"role": "user", "content": f"{_DOCUMENT}\n\n{_QUESTION}"}
    more = [{"role": "assistant", "content": _REPLY}, {"role": "user", "content": _QUESTION}]
    opening = [] if system is None else [{"role": "system", "content": _SYSTEM}]
    one, two = render(tokenizer, [*opening, asked]), render(tokenizer, [*opening, asked, *more])
    if system is not None and (one is None or _SYSTEM not in one):
        asked = {"role": "user", "content": f"{_SYSTEM}\n\n{asked['content']}"}
        one, two = render(tokenizer, [asked]), render(tokenizer, [asked, *more])
    if one is None or two is None or one.count(_DOCUMENT) != 1 or _REPLY not in two:
        raise KeepKVError(
            "the tokenizer's chat template does not repeat a document, a question and a reply as they are: chat=False "
            "does without it"
        )
    before, _, rest = one.partition(_DOCUMENT)
    first, _, reply = rest.partition(_QUESTION)
    again = two.partition(_REPLY)[2].partition(_QUESTION)[0]
    return Turns(before.replace(_SYSTEM, system or ""), first, reply, again)
