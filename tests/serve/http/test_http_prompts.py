"""Texts and chats as tokens, with templates of several kinds."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from keepkv.embedded import CHAT_TEMPLATE, embedded_model
from keepkv.errors import KeepKVError
from keepkv.serve.http.shapes.asked import KeepKV, SpanAsked
from keepkv.serve.http.shapes.compression import compression_of, spans_of
from keepkv.serve.http.shapes.pieces import Pieces, bytes_of
from keepkv.serve.http.shapes.prompts import Prompt, Prompts

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
STRICT = (  # as models have it that know turns of users and replies only
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
COUNTING = "{{ messages | length }} messages: {% for m in messages %}{{ m.content }}{% endfor %}"
DOCUMENT = "Notes. The code of amber falcon is 4821. KeepKVMark is a word. "


def prompts(template: str | None) -> Prompts:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    tokenizer.chat_template = template
    return Prompts(tokenizer)


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHATML])
def test_the_question_begins_at_the_last_message_of_a_user(template: str) -> None:
    made = prompts(template)
    chat = said(("system", DOCUMENT), ("user", "First?"), ("assistant", "Yes."), ("user", "KeepKVMark or second?"))
    prompt = made.chat(chat, {})
    assert prompt.text[prompt.cut :].startswith("KeepKVMark or second?")
    head, tail = prompt.ids[: prompt.split], prompt.ids[prompt.split :]
    assert made.tokenizer.decode(head) == prompt.text[: prompt.cut]
    assert made.tokenizer.decode(tail) == prompt.text[prompt.cut :]
    whole = made.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert tuple(whole["input_ids"]) == prompt.ids
    assert "".join(prompt.pieces) == prompt.text


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHATML, STRICT])
@pytest.mark.parametrize("kind", ["text", "messages"])
def test_a_chat_about_a_context_reads_what_the_whole_chat_would(template: str, kind: str) -> None:
    made = prompts(template)
    source: Any = DOCUMENT if kind == "text" else said(("user", DOCUMENT), ("assistant", "Read."))
    chat = said(("user", "What is it?"), ("assistant", "A falcon."), ("user", "And its code?"))
    first, remembered = made.context(source, {})
    behind = made.behind(remembered, chat, {})
    joined = said(("user", f"{DOCUMENT}\n\nWhat is it?")) + chat[1:] if kind == "text" else source + chat
    whole = made.tokenizer.apply_chat_template(joined, add_generation_prompt=True, tokenize=False)
    assert first.text + behind.text == whole
    assert made.again(remembered) == first


def test_a_text_without_a_template_is_read_as_it_is() -> None:
    made = prompts(None)
    prompt, remembered = made.context(DOCUMENT, {})
    assert list(prompt.ids) == made.tokenizer(DOCUMENT)["input_ids"] and made.again(remembered) == prompt
    with pytest.raises(KeepKVError, match="no chat template"):
        made.behind(remembered, said(("user", "What?")), {})


def test_what_a_template_refuses_or_hides_is_said() -> None:
    with pytest.raises(KeepKVError, match="roles must take turns"):
        prompts(STRICT).chat(said(("user", "a"), ("user", "b")), {})
    with pytest.raises(KeepKVError, match="does not begin as its context"):
        made = prompts(COUNTING)
        made.behind(
            made.context(said(("user", "a")), {})[1], said(("user", "b"), ("assistant", "c"), ("user", "d")), {}
        )
    with pytest.raises(KeepKVError, match="'tokenize' is not the client's"):
        prompts(CHATML).chat(said(("user", "a")), {"tokenize": True})
    with pytest.raises(KeepKVError, match="asked about by a user"):
        made = prompts(CHATML)
        made.behind(made.context("text", {})[1], said(("system", "b"), ("user", "d")), {})


def test_spans_in_characters_texts_roles_and_token_ids() -> None:
    made = prompts(CHATML)
    chat = said(("system", DOCUMENT), ("user", "What is it?"))
    prompt = made.chat(chat, {})
    asked = [SpanAsked(text="amber falcon", mode="protect"), SpanAsked(role="system", mode="default")]
    found = spans_of(asked, made.tokenizer, prompt, messages=chat) or ()
    words = [made.tokenizer.decode(prompt.ids[one.start : one.end]).strip() for one in found]
    assert words == ["amber falcon", DOCUMENT.strip()] and [one.mode for one in found] == ["protect", "default"]
    ids = Prompt.of_ids((5, 6, 7, 8, 9), "", 4)
    [span] = spans_of([SpanAsked(start=1, end=3)], made.tokenizer, ids) or ()
    assert (span.start, span.end, ids.split) == (1, 3, 4)


@pytest.mark.parametrize(
    ("span", "said_of"),
    [
        (dict(start=0, end=10**6), "does not lie in a document"),
        (dict(start=5, end=5), "does not lie in a document"),
        (dict(text="nowhere"), "0 times"),
        (dict(text="e"), "times in it|times"),
        (dict(text="What is it?"), "0 times"),
        (dict(role="assistant"), "assistant"),
        (dict(start=0, end=3, min_keep=10**6), "min_keep"),
    ],
)
def test_spans_that_do_not_lie_in_the_document_are_refused(span: dict[str, Any], said_of: str) -> None:
    made = prompts(CHATML)
    chat = said(("system", DOCUMENT), ("user", "What is it?"))
    with pytest.raises(KeepKVError, match=said_of):
        spans_of([SpanAsked(**span)], made.tokenizer, made.chat(chat, {}), messages=chat)


def test_a_client_names_no_file_of_the_server() -> None:
    with pytest.raises(KeepKVError, match="calibration"):
        compression_of(KeepKV(options={"calibration": "/etc/passwd"}))
    assert compression_of(KeepKV(receipt=True)) is None


def test_pieces_are_what_tokens_add_to_a_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    pieces, text = Pieces(tokenizer), " The code – of äther"
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = [pieces(token) for token in ids]
    assert "".join(whole).replace("\ufffd", "") in text or "\ufffd" in "".join(whole)
    assert pieces(ids[0]).startswith(" ") and bytes_of(pieces(ids[0])) == list(pieces(ids[0]).encode())
    assert bytes_of("\ufffd") is None
