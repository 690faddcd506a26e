"""Spans from characters and from chats: every token where it belongs, or a clear error."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizer

from keepkv import Span, SpanPolicy, spans_of_chat, spans_of_text
from keepkv.embedded import embedded_model
from keepkv.errors import SpanError

TEXT = "Say nothing of the 😀 key. Answer in naïve verse, now."


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded_model())


def decoded(tokenizer: Any, text: str, span: Span, **options: Any) -> str:
    return str(tokenizer.decode(tokenizer(text, **options)["input_ids"][span.start : span.end]))


@pytest.mark.parametrize("special", [True, False])
def test_pieces_of_text(tokenizer: Any, special: bool) -> None:
    """Multi-byte characters that are several tokens, and a BOS that belongs to nobody."""
    ranges = {"law": "Say nothing of the 😀 key.", "face": (19, 20), "task": Span(26, 48, "protect")}
    spans = {x.name: x for x in spans_of_text(tokenizer, TEXT, ranges, add_special_tokens=special)}
    options = {"add_special_tokens": special}
    assert decoded(tokenizer, TEXT, spans["law"], **options) == "Say nothing of the 😀 key."
    assert spans["law"].start == special and spans["law"].mode == "fair" and spans["task"].mode == "protect"
    assert decoded(tokenizer, TEXT, spans["face"], **options).strip() == "😀"
    assert spans["face"].end - spans["face"].start >= 3
    # The space before it is part of its first token.
    assert decoded(tokenizer, TEXT, spans["task"], **options).strip() == "Answer in naïve verse,"


def test_tokens_that_two_ranges_share_are_reported(tokenizer: Any) -> None:
    text = "falcon falcon falcon"
    tokens = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    shared = len(tokens) // 2
    cut = tokens[shared][0] + 1  # inside a token
    assert cut < tokens[shared][1]
    spans = spans_of_text(tokenizer, text, {"a": (0, cut), "b": (cut, len(text))})
    assert [x.name for x in spans] == ["a", "b"] and spans[0].end == spans[1].start and spans.split == {"a": [shared]}
    SpanPolicy(spans)  # no overlap
    both = spans_of_text(tokenizer, text, {"a": (0, cut), "b": (cut, len(text))}, "protect")
    assert both[1].start == shared and both.split == {"a": [shared], "b": [shared]}
    assert spans_of_text(tokenizer, text, {"all": (0, len(text))}).split == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("absent", "0 times"),
        ("a", "times"),
        ((5, 500), "beyond"),
        ((5, 5), "start < end"),
        (7, "expected"),
        ("", "times"),
    ],
)
def test_ranges_that_cannot_be_found(tokenizer: Any, given: Any, said: str) -> None:
    with pytest.raises(SpanError, match=said):
        spans_of_text(tokenizer, TEXT, {"it": given})


def test_tokenizers_without_offsets_are_refused() -> None:
    class Slow(PreTrainedTokenizer):  # type: ignore[misc]
        vocab_size = 1

        def get_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(SpanError, match="fast tokenizer"):
        spans_of_text(Slow(), TEXT, {"it": (0, 3)})


CHATML = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"  # fmt: skip # noqa: E501
HEADERS = "{{ bos_token }}{% for m in messages %}# {{ m.role }}:\n\n{{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}# assistant:\n\n{% endif %}"  # fmt: skip # noqa: E501
INSIDE = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set law = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set law = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}[INST] {% if loop.first and law %}<<SYS>>
{{ law }}
<</SYS>>

{% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }} {% endif %}{% endfor %}"""  # noqa: E501
CHAT = [
    {"role": "system", "content": "Never tell the key. "},
    {"role": "user", "content": "user"},  # as the header says
    {"role": "assistant", "content": "Naïve 😀 answer"},
    {"role": "user", "content": "What is the key?"},
]


@pytest.mark.parametrize("template", [CHATML, HEADERS, INSIDE], ids=["chatml", "headers", "inside"])
def test_messages_of_a_chat(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    spans = spans_of_chat(tokenizer, CHAT, {"system": "protect", "user": "fair", "assistant": "default"})
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    got = {x.name: tokenizer.decode(ids[x.start : x.end]).strip() for x in spans}
    assert got.keys() == {"system", "user 1", "assistant", "user 2"}
    wanted = {"system": CHAT[0], "user 1": CHAT[1], "assistant": CHAT[2], "user 2": CHAT[3]}
    for name, message in wanted.items():
        assert message["content"].strip() in got[name] and len(got[name]) <= len(message["content"].strip()) + 1
    assert {x.name: x.mode for x in spans} == {
        "system": "protect",
        "user 1": "fair",
        "user 2": "fair",
        "assistant": "default",
    }
    assert [x.start for x in spans] == sorted(x.start for x in spans)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content }}{{ m.content }}\n{% endfor %}", "2 times"),
        ("{% for m in messages %}{{ m.content | upper }}\n{% endfor %}", "0 times|changes"),
        ("{% for m in messages %}{{ m.content | replace('key', 'lock') }}\n{% endfor %}", "changes"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}", "0 times"),
        ("{% for m in messages %}{{ m.content }}{{ m.content | length }}\n{% endfor %}", "changes"),
        (
            "{% if 'key' not in messages[0].content %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}",
            "refuses",
        ),
    ],
)
def test_templates_that_rewrite_are_refused(tokenizer: Any, template: str, said: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(SpanError, match=rf"message 0 \(system\).*({said}).*spans_of_text"):
        spans_of_chat(tokenizer, CHAT, {"system": "protect"})


def test_chats_that_cannot_be_read(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    with pytest.raises(SpanError, match="tool"):
        spans_of_chat(tokenizer, CHAT, {"tool": "fair"})
    with pytest.raises(SpanError, match="list"):
        spans_of_chat(tokenizer, [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], {"user": "fair"})
    with pytest.raises(SpanError, match="not one of 'protect', 'fair'"):
        spans_of_chat(tokenizer, CHAT, {"user": "whitelist"})
    assert spans_of_chat(tokenizer, [*CHAT, {"role": "assistant", "content": " "}], {"assistant": "fair"})[0].name
