"""What is asked of a server under load: requests of every kind, and bodies that no server should take."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import partial
from typing import Any

from keepkv.tasks import demo_document

MODEL = "keepkv-embedded"


@dataclass(frozen=True)
class Asked:
    """A request that can be answered. document: before the question; context: the name of one instead. method, budget:
    None, not compressed. seed: None, greedy. n: replies to it."""

    kind: str
    question: str
    document: str | None = None
    context: str | None = None
    method: str | None = None
    budget: float | None = None
    seed: int | None = None
    n: int = 1
    tokens: int = 12
    stream: bool = False

    def body(self) -> dict[str, Any]:
        """Of a chat request."""
        messages = [{"role": "user", "content": self.question}]
        if self.document is not None:
            messages.insert(0, {"role": "system", "content": self.document})
        ours = {"context": self.context, "method": self.method, "budget": self.budget}
        made: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": self.tokens, "n": self.n}
        made |= {"temperature": 0.0} if self.seed is None else {"temperature": 1.0, "seed": self.seed}
        if given := {name: value for name, value in ours.items() if value is not None}:
            made["keepkv"] = given
        return made


def part(draw: random.Random, words: int) -> str:
    """So many words of the demo's document, from anywhere in it."""
    text = demo_document()[0].split(" ")
    at = draw.randrange(len(text) - words)
    return " ".join(text[at : at + words])


def pool(draw: random.Random) -> tuple[list[Asked], dict[str, str]]:
    """Requests, and the texts of the contexts that some of them need, by name."""
    prompts = [question.prompt.strip() for question in demo_document()[1]]
    piece = partial(part, draw)
    contexts = {f"document-{n}": piece(300) for n in range(4)}
    made = [Asked("plain", draw.choice(prompts), piece(n), tokens=draw.randrange(4, 40)) for n in (20, 40, 80, 160)]
    for method in ("snapkv", "keepkv", "keepkv2", "h2o", "adakv", "random"):
        for length, budget in ((60, 0.5), (200, 0.25)):
            made.append(Asked("compressed", draw.choice(prompts), piece(length), None, method, budget))
    made += [Asked("context", prompt, context=name, tokens=8) for name in contexts for prompt in prompts[:2]]
    made += [Asked("sampled", draw.choice(prompts), piece(50), seed=n, tokens=24) for n in range(4)]
    made += [Asked("several", draw.choice(prompts), piece(50), seed=n, n=3) for n in range(3)]
    made += [Asked("streamed", draw.choice(prompts), piece(50), stream=True, tokens=32) for _ in range(4)]
    made += [Asked("streamed", draw.choice(prompts), piece(90), None, "keepkv", 0.3, stream=True) for _ in range(2)]
    return made, contexts


def misfit(draw: random.Random) -> tuple[str, bytes]:
    """A path and a body that is to be refused."""
    fine: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
    bad: list[dict[str, Any]] = [
        {"messages": []}, {"messages": "Hello"}, {"max_tokens": -1}, {"max_tokens": 10**12}, {"temperature": -1},
        {"n": 0}, {"keepkv": {"budget": -0.5}}, {"keepkv": {"budget": 1e308}}, {"keepkv": {"budget": "lots"}},
        {"keepkv": {"method": "magic"}}, {"keepkv": {"spans": [{"start": -5, "end": 10**9, "mode": "protect"}]}},
        {"keepkv": {"context": "nowhere"}}, {"model": "another"}, {"tools": [{}]}, {"logit_bias": {"1": 5}},
    ]  # fmt: skip
    texts = [json.dumps({**fine, **one}) for one in bad]
    texts += ["", "{", "[]", '{"messages": NaN}', '{"model": "' + "x" * 100_000]
    return "/v1/chat/completions", draw.choice(texts).encode()
