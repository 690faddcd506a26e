"""Whether a text fits the positions of a model, before any work is done on it."""

from __future__ import annotations

from typing import Any

from keepkv.errors import KeepKVError

SAMPLE = 8  # characters a token: what a text's start is that is looked at first


def positions_of(model: Any) -> int | None:
    """Tokens that a model reads at most; None where its configuration does not say."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


def check_text(tokenizer: Any, model: Any, text: str, what: str) -> None:
    """Refuse ``text`` if its start alone is longer than the model reads: a long text is never tokenised as a whole."""
    limit = positions_of(model)
    if limit is None or len(text) <= SAMPLE * limit:
        return
    tokens = len(tokenizer.encode(text[: SAMPLE * limit], add_special_tokens=False))
    if tokens > limit + 1:  # a token at the cut may have been one with what follows
        raise KeepKVError(
            f"{what} has more than {tokens - 1} tokens and the model reads {limit}: give a shorter one, or a "
            "model that reads more"
        )


def check_tokens(model: Any, tokens: int, what: str, new: int = 0) -> None:
    """Refuse ``tokens``, with ``new`` ones to be written after them, if these are more than the model reads."""
    limit = positions_of(model)
    if limit is None or tokens + new <= limit:
        return
    said = f"{what} has {tokens} tokens" + (f", {new} are to follow" if new else "")
    fewer = ", ask for fewer" if new else ""
    raise KeepKVError(f"{said} and the model reads {limit}: give a shorter one{fewer}, or a model that reads more")
