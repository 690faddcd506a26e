"""From what a client sends to what the model reads: texts and chats as tokens, and where the question begins."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keepkv.serve.http.errors import Refused

Chat = Sequence[Mapping[str, str]]
NO_PLACE = (
    "the chat template does not tell where the question begins. Make a context of what stands before it, or ask for "
    "compress_question"
)


@dataclass(frozen=True)
class Prompt:
    """text: that the model reads, rendered. ids: its tokens. ends: for each token, where it ends in ``text``. cut:
    where the question begins in ``text``. plain: it was given as token ids: ``ends`` and ``cut`` count these."""

    text: str
    ids: tuple[int, ...]
    ends: Sequence[int]
    cut: int
    plain: bool = False

    @classmethod
    def of_ids(cls, ids: Sequence[int], text: str, cut: int | None) -> Prompt:
        """Of token ids, of which ``cut`` are the document; None: all."""
        return cls(text, tuple(ids), range(1, len(ids) + 1), len(ids) if cut is None else cut, plain=True)

    @property
    def split(self) -> int:
        """Tokens before the question. A token that lies across its beginning belongs to it."""
        return next((i for i, end in enumerate(self.ends) if end > self.cut), len(self.ids))

    @property
    def pieces(self) -> list[str]:
        """The text of each token, in the order of the text; empty where an earlier token has all of its characters."""
        starts = (0, *self.ends[:-1])
        return [self.text[start:end] for start, end in zip(starts, self.ends, strict=True)]


class Prompts:
    """tokenizer: of transformers, and fast, for it must say which characters a token comes from.

    Raises ``Refused`` where a chat template is missing or refuses what it gets, and where text cannot be encoded.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._own = set(inspect.signature(tokenizer.apply_chat_template).parameters)

    def text(self, text: str, cut: int | None = None, special: bool = True) -> Prompt:
        """``text`` as it is, behind the special tokens of the tokenizer if ``special``. cut: characters of its
        document; None: all of it."""
        try:
            made = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        except (UnicodeError, TypeError) as error:
            raise Refused(400, f"the text cannot be encoded: {error}") from None
        ends, last = [], 0
        for _, end in made["offset_mapping"]:  # special tokens that no text stands for have (0, 0)
            last = max(last, end)
            ends.append(last)
        return Prompt(text, tuple(made["input_ids"]), tuple(ends), len(text) if cut is None else cut)

    def chat(self, messages: Chat, options: Mapping[str, Any]) -> Prompt:
        """A chat up to where its reply begins. Its last message of a user is the question, and what follows that."""
        text = self._render(messages, options)
        asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not asked:
            return self.text(text, special=False)
        at = asked[-1]
        before = self._before(messages[:at], "", messages[at + 1 :], options)
        if not text.startswith(before):
            raise Refused(400, NO_PLACE)
        return self.text(text, len(before), special=False)

    def context(self, source: str | Chat, options: Mapping[str, Any]) -> tuple[Prompt, str]:
        """What is read of a context, and what is to be remembered of it so that ``behind`` finds what comes next.

        A text opens the turn of the user who asks about it, if the model has a chat template. Messages end where the
        content of the next one begins.
        """
        if isinstance(source, str) and not self.tokenizer.chat_template:
            prompt = self.text(source)
        else:
            prompt = self.text(self._opened(source, options), special=False)
        if not prompt.ids:
            raise Refused(400, "the context is empty: nothing is read of it")
        given = {"text": source} if isinstance(source, str) else {"messages": list(source)}
        return prompt, json.dumps({**given, "begins": _digest(prompt.text), "options": dict(options)})

    def behind(self, remembered: str, messages: Chat, options: Mapping[str, Any]) -> Prompt:
        """What a chat about a context has the model read behind it. options: of the template; empty: the context's."""
        known = json.loads(remembered)
        source, options = _source(known), options or known["options"]
        if isinstance(source, str):
            first, *rest = messages
            if first["role"] != "user":
                raise Refused(
                    400,
                    "a context made of a text is asked about by a user, and the first message is of the role "
                    f"{first['role']!r}. Make a context of messages to have others before it",
                )
            whole = [{"role": "user", "content": f"{source}\n\n{first['content']}"}, *rest]
        else:
            whole = [*source, *messages]
        before, text = self._opened(source, options), self._render(whole, options)
        if _digest(before) != known["begins"] or not text.startswith(before):
            raise Refused(
                400,
                "this chat does not begin as its context does: the chat template wrote that anew, or has other "
                "options. Make the context again",
            )
        return self.text(text[len(before) :], 0, special=False)

    def again(self, remembered: str) -> Prompt:
        """What was read of a context."""
        known = json.loads(remembered)
        return self.context(_source(known), known["options"])[0]

    def _opened(self, source: str | Chat, options: Mapping[str, Any]) -> str:
        """A context as it is rendered, up to where a question about it begins."""
        if isinstance(source, str):
            return self._before([], source, [], options)
        return self._before(source, "", [], options)

    def _before(self, earlier: Chat, opening: str, later: Chat, options: Mapping[str, Any]) -> str:
        """What is rendered before that which follows ``opening`` in a user's message, between others."""
        mark = "KeepKVMark"
        while mark in opening or any(mark in message["content"] for message in (*earlier, *later)):
            mark += "Z"
        text = self._render([*earlier, {"role": "user", "content": opening + mark}, *later], options)
        before, found, _ = text.partition(mark)
        if not found:
            raise Refused(400, NO_PLACE)
        return before

    def _render(self, messages: Chat, options: Mapping[str, Any]) -> str:
        if not self.tokenizer.chat_template:
            raise Refused(400, "this model has no chat template: use /v1/completions, or give the server one")
        if taken := sorted(self._own & options.keys()):
            raise Refused(400, f"chat_template_kwargs: {taken[0]!r} is not the client's to say")
        try:
            made: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **options
            )
        except Exception as error:  # whatever a template raises, it is about these messages
            raise Refused(400, f"the chat template refuses these messages: {error}") from error
        return made


def _source(known: Mapping[str, Any]) -> str | Chat:
    source: str | Chat = known["text"] if "text" in known else known["messages"]
    return source


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
