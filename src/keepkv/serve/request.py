"""What a request asks, and what comes back: plain data, without the web."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from keepkv.core.budget import Budget
from keepkv.core.options import Checked, Count, Rule, Seed, Size, between, keywords, shown
from keepkv.errors import KeepKVError
from keepkv.spans import Span

MOST_LISTED = 20  # alternatives of a token whose log-probabilities are told
MOST_STOPS = 16

Listed = Annotated[int, between(0, MOST_LISTED)]
Top = tuple[tuple[int, float], ...]  # token and log-probability, the likeliest first


@dataclass(frozen=True)
class Sampling(Checked):
    """How a reply is drawn.

    max_tokens: of the reply, 0 where only the prompt is scored. temperature: 0 is greedy. top_p: the likeliest tokens
    that have this share together are drawn from. seed: with one, a reply is the same whatever else is served. stop:
    texts that a reply ends before. logprobs: how many alternatives each token is told with; None: no log-probabilities.
    prompt_logprobs: the same of the tokens of the prompt. ignore_eos: the model's end of text does not end the reply.
    """

    max_tokens: Count
    temperature: Annotated[float, between(0, 100)] = 1.0
    top_p: Annotated[float, Rule("above 0 and at most 1", lambda x: 0 < x <= 1)] = 1.0
    seed: Seed | None = None
    stop: tuple[str, ...] = ()
    logprobs: Listed | None = None
    prompt_logprobs: Listed | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.stop) > MOST_STOPS or not all(isinstance(x, str) and x for x in self.stop):
            raise KeepKVError(f"stop={shown(self.stop)}: give at most {MOST_STOPS} texts, none of them empty")
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise KeepKVError("max_tokens=0 asks for no reply: give 1 at least, or prompt_logprobs to score the prompt")


@dataclass(frozen=True)
class Compression(Checked):
    """What is to become of a document. Fields that are None are the server's defaults.

    method, options: as ``keepkv.Cache`` takes them. budget: a share of the tokens, slots per KV head, or bytes; without
    one nothing is compressed. codec: how slots are written. spans: over the tokens of the document, from its first.
    every: compress again after so many tokens of the reply; only where all that is read is compressed.
    """

    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: int | float | str | None = None
    codec: str | None = None
    spans: tuple[Span, ...] | None = None
    every: Size | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "options", keywords("Compression", "options", self.options))
        if self.budget is not None:
            Budget.of(self.budget)
        for one in self.spans or ():
            if not isinstance(one, Span):
                raise KeepKVError(f"spans={shown(self.spans)}: give keepkv.Span over tokens, or None")


@dataclass(frozen=True)
class Request:
    """One reply that is asked for.

    tokens: what the model reads, behind the context if there is one; the chat template is applied. sampling: how it
    replies. compression: None is the server's default; of a context it was said when that was made, so that a request
    on one must not say another. context: name of a text that was read before. split: ``tokens[:split]`` is a document
    that is compressed before the rest, a question, is read, and the rest and the reply are kept whole; None: all that
    is read is compressed, with its end in sight. receipt: whether the reply comes with what its cache reports.
    """

    tokens: tuple[int, ...]
    sampling: Sampling
    compression: Compression | None = None
    context: str | None = None
    split: int | None = None
    receipt: bool = False


# --- what comes back, in this order: at most one Prompt, any number of Token, then one Finished or Failed ------------


@dataclass(frozen=True)
class Prompt:
    """Log-probabilities of ``Request.tokens``, each given those before it, and the likeliest in its place.

    The first token of all has none. Of a document that is compressed they are those of the model that still sees all
    of it; of what comes behind, those of the compressed cache.
    """

    logprobs: tuple[float | None, ...]
    top: tuple[Top, ...]


@dataclass(frozen=True)
class Token:
    """One token of the reply. text: what is certain of the text now, "" where that may still become a stop, or ends
    within a character. logprob: before temperature; None where none was asked for."""

    id: int
    text: str
    logprob: float | None = None
    top: Top = ()


@dataclass(frozen=True)
class Times:
    """Of ``time.perf_counter``, seconds. admitted: when its memory was reserved. read: when the prompt was. first: when
    the first token was there; None where none came."""

    arrived: float
    admitted: float
    read: float | None
    first: float | None
    ended: float


@dataclass(frozen=True)
class Finished:
    """The end of a reply.

    text: what was held back until now. prompt_tokens: context included. cached_tokens: of these, those of the context.
    completion_tokens: tokens of the reply, an end of text included. stop: the text that ended it, if one did.
    receipt: what the row's cache reports (``keepkv.Receipt.to_dict``), and under "survival" which share of all heads
    holds each token of the prompt; None where it was not asked for.
    """

    reason: Literal["stop", "length", "cancelled"]
    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    times: Times
    stop: str | None = None
    receipt: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Failed:
    """The end of a reply that could not go on; others are not touched. refused: the request itself is the reason, such
    as spans beyond its document; False: the server's fault."""

    error: str
    refused: bool = False


Event = Prompt | Token | Finished | Failed
