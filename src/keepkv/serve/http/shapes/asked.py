"""What clients may send. A field that would change the reply and is not served is refused, and so is an unknown one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from keepkv.core.options import MOST
from keepkv.serve.request import MOST_LISTED, MOST_STOPS

NO_EFFECT = frozenset(  # on a reply; clients send them for services that bill or cache
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
     "parallel_tool_calls"}
)  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields that are not served, and the values of theirs that ask for nothing
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": ("none",), "verbosity": ("medium",),
    "suffix": ("",), "best_of": (1,), "web_search_options": (), "moderation": (),
}  # fmt: skip
ALIKE = frozenset({"refusal", "annotations", "audio", "function_call", "tool_calls"})  # empty in replies sent back

Tokens = Annotated[int, Field(ge=0, le=MOST)]
Scalar = bool | int | float | str


class Asked(BaseModel):
    """Base: no unknown fields, no text where a number is meant, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SpanAsked(Asked):
    """A part of the document, as ``keepkv.Span``: a ``text`` that occurs in it once, the messages of a ``role``, or
    characters ``start`` to ``end`` (of a prompt of token ids, tokens)."""

    mode: Literal["protect", "fair", "default"] = "fair"
    text: str | None = Field(default=None, min_length=1)
    role: str | None = None
    start: Tokens | None = None
    end: Tokens | None = None
    weight: float = Field(default=1.0, gt=0)
    min_keep: Tokens = 0
    name: str | None = Field(default=None, min_length=1, max_length=100)

    @model_validator(mode="after")
    def _one(self) -> SpanAsked:
        ranged = self.start is not None and self.end is not None
        if (self.start is None) != (self.end is None) or [ranged, bool(self.text), bool(self.role)].count(True) != 1:
            raise ValueError("a span has a text, or a role, or start and end")
        if self.role and (self.weight != 1 or self.min_keep or self.name):
            raise ValueError("a span by role has no weight, min_keep or name: give its text")
        return self


class KeepKV(Asked):
    """``extra_body={"keepkv": …}``.

    method, options, budget, codec, every: as ``keepkv.Cache`` takes them; the server's where absent. spans: parts of
    the document. context: name of one that was read before. compress_question: also what is asked, in sight of which
    the rest is compressed then. document: of a prompt of /v1/completions, how many characters (of token ids, tokens)
    are the document; the rest is the question. receipt: whether the reply comes with its cache's report.
    """

    method: str | None = Field(default=None, min_length=1, max_length=200)
    options: dict[str, Scalar] = Field(default_factory=dict, max_length=64)
    budget: int | float | str | None = None
    codec: str | None = Field(default=None, min_length=1, max_length=200)
    every: Annotated[int, Field(ge=1, le=MOST)] | None = None
    spans: list[SpanAsked] | None = Field(default=None, max_length=1000)
    context: str | None = Field(default=None, min_length=1, max_length=200)
    compress_question: bool = False
    document: Tokens | None = None
    receipt: bool = False

    @property
    def says(self) -> bool:
        """Whether it says how to compress, so that the server's default is not what is asked for."""
        return bool(self.method or self.options or self.codec or self.every or self.spans or self.budget is not None)


class StreamOptions(Asked):
    """include_usage: a last chunk with the numbers of tokens."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = False


class Generation(Asked):
    """What chats and completions have in common."""

    model: str | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    keepkv: KeepKV = KeepKV()

    @model_validator(mode="before")
    @classmethod
    def _served(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for field in NEUTRAL.keys() & given.keys():
            if given[field] is not None and given[field] not in NEUTRAL[field]:
                raise ValueError(f"{field} is not served here: leave it out")
        return {key: value for key, value in given.items() if key not in NEUTRAL and key not in NO_EFFECT}

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that a reply ends before."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Part(Asked):
    """Of a message; texts only."""

    type: Literal["text"]
    text: str


class Message(Asked):
    """Of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if not (key in ALIKE and not value)}

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[list[Message], Field(min_length=1, max_length=10_000)]
TemplateOptions = Annotated[dict[str, Scalar], Field(max_length=64)]


class Chat(Generation):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LISTED)] | None = None
    chat_template_kwargs: TemplateOptions = Field(default_factory=dict)

    @model_validator(mode="after")
    def _listed(self) -> Chat:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


Ids = Annotated[list[Tokens], Field(min_length=1)]


class Completion(Generation):
    """POST /v1/completions."""

    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LISTED)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more prompts."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")]


class ContextAsked(Asked):
    """POST /v1/contexts: a ``text`` or ``messages``, under a ``name``; one is found where there is none."""

    name: Name | None = None
    text: str | None = Field(default=None, min_length=1)
    messages: Messages | None = None
    chat_template_kwargs: TemplateOptions = Field(default_factory=dict)
    replace: bool = False
    keepkv: KeepKV = KeepKV()

    @model_validator(mode="after")
    def _one(self) -> ContextAsked:
        if (self.text is None) == (self.messages is None):
            raise ValueError("give text or messages")
        return self


class EstimateAsked(Asked):
    """POST /v1/estimate: what a ``text``, or so many ``tokens``, would take."""

    text: str | None = None
    tokens: Annotated[int, Field(ge=1, le=MOST)] | None = None
    keepkv: KeepKV = KeepKV()

    @model_validator(mode="after")
    def _one(self) -> EstimateAsked:
        if (self.text is None) == (self.tokens is None):
            raise ValueError("give text or tokens")
        return self
