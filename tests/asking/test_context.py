"""A text is read once and asked about many times; a question leaves no trace unless it is kept."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers

import keepkv
from keepkv.asking.turns import turns_of
from keepkv.embedded import embedded_model
from keepkv.engine.versions import CACHE
from keepkv.errors import KeepKVError
from keepkv.tasks import demo_document

TEXT, QUESTIONS = demo_document(characters=1200, facts=4)
ASKED = [question.prompt.strip() for question in QUESTIONS]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT


@cache
def loaded() -> tuple[Any, Any]:
    path = embedded_model()
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    return model, transformers.AutoTokenizer.from_pretrained(path)


def templated(template: str | None) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded_model())
    tokenizer.chat_template = template
    return tokenizer


def stock(text: str, tokenizer: Any, new: int = 12) -> str:
    """What the model itself says, without keepkv."""
    model = transformers.AutoModelForCausalLM.from_pretrained(embedded_model()).eval()
    ids = torch.tensor([tokenizer.encode(text)])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return str(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True))


def test_a_whole_budget_gives_the_models_own_reply() -> None:
    model, tokenizer = loaded()
    read = keepkv.Context(model, tokenizer, TEXT, 1.0, "snapkv")
    for asked in ASKED:
        own = stock(f"{TEXT}\n\nQuestion: {asked}\nAnswer:", tokenizer).partition("\n\nQuestion:")[0].strip()
        assert read.ask(asked, max_new_tokens=12) == own


@pytest.mark.parametrize("method", ["auto", "many-questions", "keepkv2", "snapkv"])
def test_a_question_leaves_no_trace(method: str) -> None:
    read = keepkv.Context(*loaded(), TEXT, 0.3, method)
    before, kept = read.report(), read.cache.kept_positions(0)
    first = [read.ask(asked, max_new_tokens=8) for asked in ASKED]
    assert [read.ask(asked, max_new_tokens=8) for asked in ASKED] == first
    assert before.compressed and before.ratio < 0.35
    assert read.report().bytes == before.bytes
    assert torch.equal(read.cache.kept_positions(0), kept)


@pytest.mark.parametrize("method", ["snapkv", "keepkv2", "compactor"])
def test_chunks_are_read_as_one_piece(method: str) -> None:
    """A method that reads twice repeats the text chunk by chunk, which is its own choice."""
    whole, parts = (keepkv.Context(*loaded(), TEXT, 0.3, method, chunk=chunk) for chunk in (4096, 64))
    for layer in range(len(whole.cache.layers)):
        mine, other = (x.cache.kept_positions(layer) for x in (whole, parts))
        same = (mine == other).float().mean()
        assert same > 0.98, f"layer {layer}: {same:.3f}"


def test_kept_turns_are_in_sight_of_the_next() -> None:
    """A conversation at a whole budget is what the model says to the same text at once."""
    model, tokenizer = loaded()
    read = keepkv.Context(model, tokenizer, TEXT, 1.0, "snapkv")
    said = read.ask(ASKED[0], keep=True, max_new_tokens=8)
    text = f"{TEXT}\n\nQuestion: {ASKED[0]}\nAnswer: {said}\n\nQuestion: {ASKED[1]}\nAnswer:"
    own = stock(text, tokenizer, 8).partition("\n\nQuestion:")[0].strip()
    assert read.ask(ASKED[1], max_new_tokens=8) == own
    assert read.report().seen == [len(read.ids)]


def test_ask_is_a_context_and_its_questions() -> None:
    model, tokenizer = loaded()
    answers = keepkv.ask(model, tokenizer, TEXT, ASKED, 0.4, "keydiff", max_new_tokens=8)
    read = keepkv.Context(model, tokenizer, TEXT, 0.4, "keydiff")
    assert list(answers) == [read.ask(asked, max_new_tokens=8) for asked in ASKED]
    assert len(answers) == len(ASKED) and answers[0] == answers.replies[0]
    assert ASKED[0] in str(answers) and str(answers.receipt) in str(answers)
    turns = keepkv.ask(model, tokenizer, TEXT, ASKED[:2], 1.0, "keydiff", max_new_tokens=8, turns=True)
    read = keepkv.Context(model, tokenizer, TEXT, 1.0, "keydiff")
    assert list(turns) == [read.ask(asked, max_new_tokens=8, keep=True) for asked in ASKED[:2]]


def test_it_reads_twice_where_the_method_does() -> None:
    model, tokenizer = loaded()
    read = keepkv.Context(model, tokenizer, TEXT, 0.3, "many-questions")
    cache = keepkv.Cache(model, "many-questions", 0.3, when=keepkv.When("deferred"))
    ids = torch.tensor([read.ids])
    with torch.inference_mode():
        model(ids, **{CACHE: cache})
    keepkv.reread(model, cache, ids)
    cache.compress()
    assert torch.equal(cache.kept_positions(1), read.cache.kept_positions(1))


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("template", [CHAT, NO_SYSTEM])
def test_turns_are_those_of_the_chat_template(template: str, system: str | None) -> None:
    tokenizer = templated(template)
    turns = turns_of(tokenizer, system)
    made = turns.before + "DOC" + turns.question("ONE", False) + turns.replied("R") + turns.question("TWO", True)
    user, opening = "DOC\n\nONE", []
    if system and template == CHAT:
        opening = [{"role": "system", "content": system}]
    elif system:
        user = f"{system}\n\n{user}"
    chat = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": "R"},
        {"role": "user", "content": "TWO"},
    ]
    assert made == tokenizer.apply_chat_template([*opening, *chat], tokenize=False, add_generation_prompt=True)


def test_a_template_is_used_where_there_is_one() -> None:
    model, tokenizer = loaded()
    read = keepkv.Context(model, templated(CHAT), TEXT, 1.0, "snapkv")
    assert tokenizer.decode(read.ids[:8]).startswith("<user>")
    assert keepkv.Context(model, templated(CHAT), TEXT, 1.0, "snapkv", chat=False).ids == tokenizer.encode(TEXT)


def test_generation_options_and_streams_pass_through() -> None:
    model, tokenizer = loaded()
    read = keepkv.Context(model, tokenizer, TEXT, 0.5, "keydiff")
    torch.manual_seed(0)
    drawn = {read.ask(ASKED[0], max_new_tokens=8, do_sample=True, temperature=5.0) for _ in range(4)}
    assert len(drawn) > 1
    pieces: list[str] = []

    class Streamer(transformers.TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)

    said = read.ask(ASKED[0], max_new_tokens=8, streamer=Streamer(tokenizer, skip_prompt=True))
    assert said in "".join(pieces)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"text": "  "}, "the context is empty"),
        ({"text": None}, "NoneType"),
        ({"chunk": 0}, "chunk=0"),
        ({"chat": True}, "no chat template"),
        ({"method": "snapkvv"}, "snapkv"),
        ({"budget": -1}, "budget"),
        ({"text": "word " * 9000}, "give a shorter one"),
    ],
)
def test_what_cannot_be_read_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(KeepKVError, match=said):
        keepkv.Context(*loaded(), **{"text": TEXT, **given})


@pytest.mark.parametrize("questions", [[], "", ["fine", " "], [3]])
def test_questions_that_are_none_are_refused(questions: Any) -> None:
    with pytest.raises(KeepKVError, match="questions"):
        keepkv.ask(*loaded(), TEXT, questions)


def test_a_reply_that_does_not_fit_is_refused_and_the_context_is_as_it_was() -> None:
    read = keepkv.Context(*loaded(), TEXT, 0.3, "keydiff")
    with pytest.raises(KeepKVError, match="the model reads 4096"):
        read.ask(ASKED[0], max_new_tokens=4000)
    with pytest.raises(KeepKVError, match="question is empty"):
        read.ask("")
    assert read.ask(ASKED[0], max_new_tokens=4)


def test_a_chat_template_that_changes_texts_is_refused() -> None:
    with pytest.raises(KeepKVError, match="chat=False"):
        turns_of(templated("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"))
