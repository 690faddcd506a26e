"""Replies of the engine are those of a cache alone."""

from __future__ import annotations

from typing import Any

from helpers.serving import DOCUMENT, QUESTIONS, alone, encoded, greedy, serving, told
from keepkv.serve.request import Compression, Finished

WHOLE = encoded(DOCUMENT + QUESTIONS[0].prompt)
TEXT, QUESTION = encoded(DOCUMENT), encoded(QUESTIONS[1].prompt, first=False)

ASKED: list[tuple[str, Any, dict[str, Any]]] = [
    ("full", None, {}),
    ("snapkv", 0.3, {}),
    ("snapkv", 64, {"window": 8}),
    ("adakv", 0.4, {}),
    ("keepkv2", "40%bytes", {}),
    ("h2o", 0.5, {}),
    ("knorm", 0.5, {}),
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
        assert end.receipt["compressed"] == (method != "full") and end.prompt_tokens == 120 + 30 * i
