"""A reply does not depend on what else is served: the same bits, whoever joins and leaves meanwhile."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from serving import DOCUMENT, QUESTIONS, encoded, greedy, loaded, serving, told

from keepkv.serve.batch.decode import Decoder
from keepkv.serve.request import Compression, Failed, Request, Sampling, Token
from keepkv.serve.stream import Stream

WHOLE = encoded(DOCUMENT)
METHODS: list[Compression | None] = [
    None, Compression("snapkv", {}, 0.3), Compression("adakv", {}, 0.4), Compression("keepkv2", {}, 60),
    Compression("g-kv", {"window": 8}, 40, every=5),
]  # fmt: skip


def bits(stream: Stream) -> list[tuple[int, float | None, Any]]:
    tokens, end = told(stream)
    assert not isinstance(end, Failed), end
    return [(x.id, x.logprob, x.top) for x in tokens]


def request(draw: random.Random, i: int) -> Request:
    start, length = draw.randrange(0, 100), draw.choice([3, 64, 65, 130, 200])
    sampling = Sampling(
        draw.randrange(3, 14), temperature=draw.choice([0.0, 0.9]), top_p=0.9, seed=i, logprobs=3, ignore_eos=True
    )
    if draw.random() < 0.25:
        return Request(encoded(QUESTIONS[i % 4].prompt, first=False), sampling, context="doc")
    return Request(WHOLE[start : start + length], sampling, draw.choice(METHODS))


def test_replies_among_others_are_those_alone_bit_for_bit() -> None:
    """Log-probabilities are compared as numbers: any bit that differs would show."""
    draw = random.Random(5)
    requests = [request(draw, i) for i in range(14)]
    with serving(rows=6) as engine:
        assert set(engine.stats().widths) <= {1, 4, 8}  # the processor decides which of them
        engine.contexts.create("doc", WHOLE[:150], "", METHODS[1]).result(120)
        alone = [bits(engine.submit(one)) for one in requests]
        draw.shuffle(order := list(range(len(requests))))
        streams: dict[int, Stream] = {}
        for n, i in enumerate(order):
            streams[i] = engine.submit(requests[i])
            if n % 3 == 2:  # somebody comes who leaves in the middle
                passing = engine.submit(greedy(WHOLE[:70], 400))
                time.sleep(draw.random() * 0.05)
                passing.cancel()
        together = [bits(streams[i]) for i in range(len(requests))]
        assert engine.stats().decoded > 1.5 * engine.stats().steps - 200
    assert together == alone


def test_widths_are_found_by_trying(monkeypatch: Any) -> None:
    """Where rows feel each other they are decoded one by one, where a width rounds in its own way it is left out."""
    model, _ = loaded()
    assert set(Decoder(model, 16).widths) <= {1, 4, 8, 16}  # the processor decides which of them
    assert Decoder(model, 3, exact=False).widths == (1, 2, 3)
    logits = torch.randn(model.config.vocab_size, 5, generator=torch.Generator().manual_seed(0))

    def by_token(self: Any, cache: Any, tokens: Any, places: Any, width: int) -> torch.Tensor:
        return logits[[*tokens, *[0] * (width - len(tokens))]]

    def of_eight(*given: Any) -> torch.Tensor:
        return by_token(*given) + (1e-6 if given[-1] == 8 else 0)

    def of_neighbours(*given: Any) -> torch.Tensor:
        found = by_token(*given)
        return found + 1e-6 * found.mean()

    for forward, rows, widths in [
        (by_token, 16, (4, 8, 16)), (by_token, 5, (4, 8)), (of_eight, 16, (4, 16)), (of_neighbours, 16, (1,)),
    ]:  # fmt: skip
        monkeypatch.setattr(Decoder, "_forward", forward)
        assert Decoder(model, rows).widths == widths


def test_rows_that_are_decoded_one_by_one_say_the_same() -> None:
    with serving() as engine:
        asked = [greedy(WHOLE[10 * i : 90], 8, compression=METHODS[i % 3]) for i in range(4)]
        together = [told(stream)[0] for stream in [engine.submit(one) for one in asked]]
        engine.worker.decoder.widths = (1,)
        alone = [told(stream)[0] for stream in [engine.submit(one) for one in asked]]
    assert [[x.id for x in one] for one in together] == [[x.id for x in one] for one in alone]


def test_a_seed_says_the_same_and_none_does_not() -> None:
    def texts(seed: int | None) -> list[list[int]]:
        sampling = Sampling(12, temperature=1.5, seed=seed, ignore_eos=True)
        streams = [engine.submit(Request(WHOLE[:60], sampling)) for _ in range(3)]
        return [[x.id for x in told(stream)[0] if isinstance(x, Token)] for stream in streams]

    with serving() as engine:
        one, two = texts(3), texts(3)
        assert one[0] == one[1] == one[2] == two[0]
        assert texts(4)[0] != one[0] and len({tuple(x) for x in texts(None)}) > 1
