"""Engines for tests of the server, and the same replies without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import keepkv
from keepkv.core.when import When
from keepkv.engine.versions import CACHE
from keepkv.serve.engine import Engine
from keepkv.serve.request import Failed, Finished, Request, Sampling, Token
from keepkv.serve.settings import Settings
from keepkv.serve.stream import Stream
from keepkv.tasks import demo_document

DOCUMENT, QUESTIONS = demo_document(characters=1500, facts=4)


@cache
def loaded() -> tuple[Any, Any]:
    """The embedded model and its tokenizer."""
    path = keepkv.embedded_model()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def encoded(text: str, first: bool = True) -> tuple[int, ...]:
    """Tokens of ``text``; first: with the token that texts begin with."""
    return tuple(loaded()[1].encode(text, add_special_tokens=first))


@contextmanager
def serving(grace: float = 0.0, **settings: Any) -> Iterator[Engine]:
    """An engine that runs the embedded model."""
    engine = Engine(*loaded(), Settings(**{"rows": 4, "chunk": 64, "memory": 1 << 30, **settings}))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(grace)


def greedy(tokens: tuple[int, ...], new: int = 12, **more: Any) -> Request:
    """A request for ``new`` greedy tokens; ``more`` of it, and of its sampling."""
    asked = {name: more.pop(name) for name in list(more) if name in Sampling.__dataclass_fields__}
    return Request(tokens, Sampling(new, **{"temperature": 0.0, "ignore_eos": True, **asked}), **more)


def told(stream: Stream, timeout: float = 120.0) -> tuple[list[Token], Finished | Failed]:
    """All tokens of a reply, and its end."""
    tokens: list[Token] = []
    while True:
        event = stream.get(timeout)
        if isinstance(event, (Finished, Failed)):
            return tokens, event
        if isinstance(event, Token):
            tokens.append(event)


def said(stream: Stream) -> str:
    """The text of a reply that ends well."""
    tokens, end = told(stream)
    assert isinstance(end, Finished), end
    return "".join(x.text for x in tokens) + end.text


def alone(tokens: tuple[int, ...], new: int, method: str, budget: Any = None, **options: Any) -> list[int]:
    """The same greedy reply by ``generate``, with a cache and nothing else."""
    model, tokenizer = loaded()
    held = keepkv.Cache(model, method, budget, **options)
    ids = torch.tensor([tokens])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=[], **{CACHE: held},
    )  # fmt: skip
    return list(out[0, len(tokens) :].tolist())


@torch.inference_mode()
def asked_of(document: tuple[int, ...], question: tuple[int, ...], new: int, method: str, budget: Any) -> list[int]:
    """A greedy reply to ``question`` about a ``document`` that was compressed before, a forward at a time."""
    model, _ = loaded()
    held = keepkv.Cache(model, method, budget, **({} if method == "full" else {"when": When("deferred")}))
    with held.reading():
        model(torch.tensor([document]), **{CACHE: held})
        if method != "full":
            held.compress()
        held.compressing = False
        out = model(torch.tensor([question]), position_ids=_places(held, len(question)), **{CACHE: held})
    reply = [int(out.logits[0, -1].argmax())]
    while len(reply) < new:
        out = model(torch.tensor([reply[-1:]]), position_ids=_places(held, 1), **{CACHE: held})
        reply.append(int(out.logits[0, -1].argmax()))
    return reply


def _places(held: Any, new: int) -> torch.Tensor:
    seen = held.get_seq_length()
    return torch.arange(seen, seen + new)[None]
