"""The text of a reply, as its tokens come: whole characters only, and nothing that may still become a stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what a tokenizer writes for bytes that are no character, or not yet one
BEFORE = 8  # tokens of the prompt that the first ones are decoded behind: a tokenizer may drop a text's first space


class Text:
    """What is certain of a text that grows by tokens.

    before: the tokens in front of it. stop: texts that end it. stopped: the one that did.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop, self.stopped = tokenizer, tuple(stop), None
        self._ids = list(before[-BEFORE:])
        if self._decoded(0, len(self._ids)).endswith(BROKEN):
            self._ids = []
        self._from, self._to = 0, len(self._ids)  # tokens that the next ones are decoded behind
        self._known = self._decoded(self._from, self._to)
        self._held = ""

    stopped: str | None

    def add(self, token: int) -> str:
        """What is certain now that ``token`` has come; "" once a stop was found."""
        if self.stopped is not None:
            return ""
        self._ids.append(token)
        return self._certain(self._fresh())

    def end(self) -> str:
        """What was held back: no more tokens come."""
        if self.stopped is not None:
            return ""
        rest = self._certain(self._fresh(last=True))
        rest, self._held = rest + self._held, ""
        return rest

    def _fresh(self, last: bool = False) -> str:
        """Whole characters that were not told yet; last: broken ones too."""
        known, whole = self._known, self._decoded(self._from, len(self._ids))
        if len(whole) <= len(known) or (whole.endswith(BROKEN) and not last):
            return ""
        self._from, self._to = self._to, len(self._ids)
        self._known = self._decoded(self._from, self._to)
        return whole[len(known) :]

    def _certain(self, fresh: str) -> str:
        """Of what was held and ``fresh``, all that no stop can begin in."""
        text = self._held + fresh
        found = [(at, one) for one in self.stop if (at := text.find(one)) >= 0]
        if found:
            at, self.stopped = min(found)
            self._held = ""
            return text[:at]
        held = max((_begins(text, one) for one in self.stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _decoded(self, start: int, end: int) -> str:
        text: str = self.tokenizer.decode(self._ids[start:end], skip_special_tokens=True)
        return text


def _begins(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
