"""Log-probabilities in the shapes of the two endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keepkv.serve.http.shapes.pieces import Pieces, bytes_of
from keepkv.serve.request import Prompt, Token, Top

LEAST = -9999.0  # JSON has no infinity


def _told(logprob: float) -> float:
    return max(LEAST, logprob)


def of_chat(tokens: Sequence[Token], pieces: Pieces) -> dict[str, Any]:
    """As chats have it: an entry a token, each with its alternatives."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": pieces(token), "logprob": _told(logprob), "bytes": bytes_of(pieces(token))}

    content = [
        {**entry(one.id, one.logprob or 0.0), "top_logprobs": [entry(*other) for other in one.top]} for one in tokens
    ]
    return {"content": content, "refusal": None}


def of_completion(
    ids: Sequence[int], logprobs: Sequence[float | None], top: Sequence[Top], pieces: Pieces, start: int = 0
) -> dict[str, Any]:
    """As completions have it: a list for each column. start: characters before the first token."""
    words, offsets = [pieces(token) for token in ids], []
    for word in words:
        offsets.append(start)
        start += len(word)
    return {
        "tokens": words,
        "token_logprobs": [None if x is None else _told(x) for x in logprobs],
        "top_logprobs": [
            None if x is None else _alternatives(token, x, others, pieces)
            for token, x, others in zip(ids, logprobs, top, strict=True)
        ],
        "text_offset": offsets,
    }


def _alternatives(token: int, logprob: float, others: Top, pieces: Pieces) -> dict[str, float]:
    """By text, the likeliest where two tokens have the same; the chosen token is always among them."""
    found: dict[str, float] = {}
    for other, x in (*others, (token, logprob)):
        word = pieces(other)
        found[word] = max(_told(x), found.get(word, LEAST))
    return found


def of_prompt(prompt: Prompt, ids: Sequence[int], pieces: Pieces) -> dict[str, Any]:
    """Of the tokens that a completion echoes."""
    return of_completion(ids, prompt.logprobs, prompt.top, pieces)


def of_tokens(tokens: Sequence[Token], pieces: Pieces, start: int = 0) -> dict[str, Any]:
    """Of the tokens of a completion."""
    return of_completion(
        [one.id for one in tokens], [one.logprob for one in tokens], [one.top for one in tokens], pieces, start
    )


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """One behind the other."""
    return {key: first[key] + second[key] for key in first}
