"""Replies of the engine are those of a cache alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from serving import DOCUMENT, QUESTIONS, alone, asked_of, encoded, greedy, loaded, said, serving, told

from keepkv.core.when import When
from keepkv.errors import BudgetError, KeepKVError
from keepkv.serve.request import Compression, Failed, Finished, Prompt
from keepkv.spans import Span

WHOLE = encoded(DOCUMENT + QUESTIONS[0].prompt)
TEXT, QUESTION = encoded(DOCUMENT), encoded(QUESTIONS[1].prompt, first=False)

ASKED: list[tuple[str, Any, dict[str, Any]]] = [
    ("full", None, {}),
    ("snapkv", 0.3, {}),
    ("snapkv", 64, {"window": 8}),
    ("adakv", 0.4, {}),
    ("keepkv2", "40%bytes", {}),
    ("h2o", 0.5, {}),
    ("pyramidkv", 0.4, {}),
]


def test_of_many_methods_at_once() -> None:
    with serving(rows=8) as engine:
        streams = [
            engine.submit(greedy(WHOLE[: 120 + 30 * i], compression=Compression(method, options, budget), receipt=True))
            for i, (method, budget, options) in enumerate(ASKED)
        ]
        replies = [told(stream) for stream in streams]
    for i, ((method, budget, options), (tokens, end)) in enumerate(zip(ASKED, replies, strict=True)):
        assert isinstance(end, Finished) and end.reason == "length" and end.receipt is not None, end
        assert [x.id for x in tokens] == alone(WHOLE[: 120 + 30 * i], 12, method, budget, **options), method
        assert end.receipt["compressed"] == (method != "full")
        assert (end.prompt_tokens, end.cached_tokens, end.completion_tokens) == (120 + 30 * i, 0, 12)
        assert len(end.receipt["survival"]) >= 120 + 30 * i - 1 and max(end.receipt["survival"]) == 1
        assert end.times.arrived <= end.times.admitted <= (end.times.first or 0) <= end.times.ended


def test_while_a_reply_is_compressed_again_and_again() -> None:
    asked = Compression("g-kv", {"window": 8}, 40, every=6)
    with serving() as engine:
        tokens, end = told(engine.submit(greedy(WHOLE[:100], 24, compression=asked, receipt=True)))
    assert isinstance(end, Finished) and end.receipt is not None
    assert end.receipt["compressions"] >= 4 * len(loaded()[0].model.layers)
    assert [x.id for x in tokens] == alone(WHOLE[:100], 24, "g-kv", 40, window=8, when=When(every=6))


@pytest.mark.parametrize(("method", "budget"), [("snapkv", 0.3), ("keepkv2", 0.4), ("full", None)])
def test_about_a_document_that_is_compressed_before_its_question(method: str, budget: Any) -> None:
    """In the request, or as a context."""
    expected = asked_of(TEXT, QUESTION, 8, method, budget)
    asked = Compression(method, {}, budget)
    with serving(chunk=1024) as engine:
        made = engine.contexts.create("doc", TEXT, DOCUMENT, asked)
        split = engine.submit(greedy(TEXT + QUESTION, 8, compression=asked, split=len(TEXT)))
        info = made.result(120)
        on_it = [engine.submit(greedy(QUESTION, 8, context="doc")) for _ in range(2)]
        replies = [told(stream) for stream in (split, *on_it)]
    assert [[x.id for x in tokens] for tokens, _ in replies] == [expected] * 3
    assert [end.cached_tokens for _, end in replies if isinstance(end, Finished)] == [0, len(TEXT), len(TEXT)]
    assert info.tokens == len(TEXT) and info.text == DOCUMENT and (info.bytes < info.full_bytes) == (method != "full")
    assert len(info.survival) == len(TEXT) and "survival" not in info.receipt


def test_of_a_prompt_in_one_piece_and_in_many() -> None:
    asked = Compression("snapkv", {}, 0.3)
    replies = []
    for chunk in (32, 4096):
        with serving(chunk=chunk) as engine:
            replies.append(said(engine.submit(greedy(WHOLE, compression=asked))))
    assert replies[0] == replies[1]


def test_of_the_servers_own_settings() -> None:
    with serving(compression=Compression("snapkv", {"window": 8}, 0.3)) as engine:
        plain = engine.submit(greedy(WHOLE[:150], receipt=True))
        other = engine.submit(greedy(WHOLE[:150], receipt=True, compression=Compression(budget=0.5)))
        ends = [told(stream)[1] for stream in (plain, other)]
    found = [x.receipt for x in ends if isinstance(x, Finished) and x.receipt is not None]
    assert [(x["method"], x["options"]["window"], x["budget"]) for x in found] == [
        ("snapkv", 8, 0.3),
        ("snapkv", 8, 0.5),
    ]


def test_spans_reach_the_cache() -> None:
    spans = (Span(10, 30, "protect", name="rule"),)
    with serving() as engine:
        stream = engine.submit(
            greedy(WHOLE[:150], receipt=True, compression=Compression("snapkv", {}, 0.4, spans=spans))
        )
        end = told(stream)[1]
        with pytest.raises(KeepKVError, match="ends at token 400"):
            far = (Span(10, 400, "protect"),)
            engine.submit(greedy(WHOLE[:150], compression=Compression("snapkv", {}, 0.4, spans=far)))
    assert isinstance(end, Finished) and end.receipt is not None
    assert end.receipt["spans"]["keep_rate"]["rule"] == 1.0 and end.receipt["survival"][10:30] == [1.0] * 20


def test_a_prompt_is_scored() -> None:
    """Log-probabilities are the model's own, in one piece or in many; the first token has none."""
    model, _ = loaded()
    ids = WHOLE[:90]
    with torch.inference_mode():
        own = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    with serving(chunk=32) as engine:
        stream = engine.submit(greedy(ids, 0, prompt_logprobs=2))
        first, end = stream.get(60), stream.get(60)
    assert isinstance(first, Prompt) and isinstance(end, Finished) and end.completion_tokens == 0
    assert first.logprobs[0] is None and first.top[0] == ()
    expected = [float(own[i, token]) for i, token in enumerate(ids[1:])]
    assert [x for x in first.logprobs if x is not None] == pytest.approx(expected, abs=1e-4)
    assert all(len(top) == 2 and top[0][1] >= top[1][1] for top in first.top[1:])


def test_what_comes_behind_a_document_is_scored_by_what_is_left_of_it() -> None:
    asked = Compression("snapkv", {}, 0.2)
    with serving(chunk=1024) as engine:
        pair = [
            engine.submit(greedy(TEXT + QUESTION, 0, prompt_logprobs=0, split=len(TEXT), compression=one)).get(60)
            for one in (asked, Compression("full"))
        ]
    compressed, whole = (x.logprobs for x in pair if isinstance(x, Prompt))
    assert compressed[: len(TEXT) + 1] == whole[: len(TEXT) + 1]
    assert compressed[len(TEXT) + 1 :] != whole[len(TEXT) + 1 :]


def test_an_end_of_text_ends_a_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as engine:
        free, _ = told(engine.submit(greedy(WHOLE[:80], 6)))
        engine.ends = frozenset({free[3].id})
        tokens, end = told(engine.submit(greedy(WHOLE[:80], 6, ignore_eos=False)))
    at = [x.id for x in free].index(free[3].id)
    assert isinstance(end, Finished) and end.reason == "stop" and end.completion_tokens == at + 1
    assert [x.id for x in tokens] == [x.id for x in free[:at]]


def test_a_stop_ends_a_reply_before_it() -> None:
    with serving() as engine:
        whole = said(engine.submit(greedy(WHOLE[:80], 12)))
        stop = whole[3:6]
        stream = engine.submit(greedy(WHOLE[:80], 12, stop=(stop, "never said")))
        tokens, end = told(stream)
    assert isinstance(end, Finished) and end.reason == "stop" and end.stop == stop
    assert "".join(x.text for x in tokens) + end.text == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("request_", "error", "said_"),
    [
        (greedy(()), KeepKVError, "one token at least"),
        (greedy((1, 99999)), KeepKVError, "each from 0 to 2047"),
        (greedy((1, 2), split=2), KeepKVError, "need a token each"),
        (greedy((1, 2), split=-1), KeepKVError, "need a token each"),
        (greedy((1, 2), compression=Compression("snapkv")), BudgetError, "needs a budget"),
        (greedy((1, 2), compression=Compression("nothing", {}, 0.5)), KeepKVError, "unknown method"),
        (greedy((1, 2), compression=Compression("snapkv", {"windw": 3}, 0.5)), KeepKVError, "windw"),
        (greedy((1, 2, 3), split=1, compression=Compression("snapkv", {}, 0.5, every=4)), KeepKVError, "kept whole"),
        (greedy((1, 2), context="none"), KeepKVError, "no context 'none'"),
        (greedy((1, 2), 5000), KeepKVError, "4,096 are the most"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_at_once(request_: Any, error: Any, said_: str) -> None:
    with serving() as engine:
        with pytest.raises(error, match=said_):
            engine.submit(request_)
        assert sum(engine.stats().refused.values()) == 1
        assert said(engine.submit(greedy(WHOLE[:20], 3)))


def test_what_is_found_out_while_reading_ends_the_reply_alone() -> None:
    with serving() as engine:
        bad = engine.submit(greedy(WHOLE[:200], compression=Compression("snapkv", {}, "2KiB")))
        good = engine.submit(greedy(WHOLE[:40], 6))
        assert said(good)
        end = told(bad)[1]
    assert isinstance(end, Failed) and end.refused and "budget of 2 KiB" in end.error
