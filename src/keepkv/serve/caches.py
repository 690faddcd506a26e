"""What a request is made into: an empty cache of its settings, within what the server allows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from keepkv.core.budget import Budget
from keepkv.core.when import When
from keepkv.engine.cache import Cache
from keepkv.errors import BudgetError, KeepKVError
from keepkv.serve.batch.reading import late
from keepkv.serve.request import Compression
from keepkv.serve.settings import Settings

# Methods where none is named: all that is read, its question included, or a document before that.
WHOLE, DOCUMENT = "long-document", "many-questions"


def empty_cache(model: Any, asked: Compression | None, settings: Settings, tokens: int, document: bool) -> Cache:
    """For a prompt of ``tokens``, of which all is compressed at its end, or a ``document`` before what follows.

    Raises ``KeepKVError`` where it is not what the server allows, or not what there is.
    """
    chosen = merged(asked or Compression(), settings.compression)
    method = chosen.method or (DOCUMENT if document else WHOLE)
    if chosen.budget is None:
        if asked is not None and asked.method not in (None, "full"):
            raise BudgetError(f"method {asked.method!r} needs a budget, such as 0.25 of the tokens or 1024 slots")
        _check_budget(None, settings, tokens)
        return Cache(model, "full")
    if settings.methods is not None and method not in settings.methods:
        raise KeepKVError(f"method {method!r} is not served here: ask for one of {', '.join(settings.methods)}")
    _check_budget(chosen.budget, settings, tokens)
    options = dict(chosen.options)
    if document and (asked is None or asked.every is None):
        chosen = replace(chosen, every=None)  # the server's, which is for what is compressed as a whole
    if chosen.every is not None:
        if document:
            raise KeepKVError(
                f"every={chosen.every}: what comes behind a document is kept whole. Leave it out, or have all of the "
                "prompt compressed (no split, no context)"
            )
        if "when" in options:
            raise KeepKVError("every and the option when say the same: give one of them")
        options["when"] = When(every=chosen.every)
    spans = list(chosen.spans) if chosen.spans is not None else None
    for span in spans or ():
        if span.end > tokens:
            raise KeepKVError(f"span {span.label} ends at token {span.end} of a document of {tokens}")
    return late(Cache(model, method, chosen.budget, codec=chosen.codec or "none", spans=spans, **options))


def merged(asked: Compression, default: Compression) -> Compression:
    """``asked``, and where it says nothing ``default``. Options go with the method that they are of."""
    own = asked.method is not None and asked.method != default.method
    return Compression(
        method=asked.method or default.method,
        options={**({} if own else default.options), **asked.options},
        budget=default.budget if asked.budget is None else asked.budget,
        codec=asked.codec or default.codec,
        spans=asked.spans,
        every=asked.every or default.every,
    )


def _check_budget(asked: float | int | str | None, settings: Settings, tokens: int) -> None:
    """Raise where ``asked`` is more of ``tokens`` than a request may keep; None is all of them."""
    limit, seen = Budget.of(settings.budget), torch.tensor([tokens])
    budget = Budget.of(1.0 if asked is None else asked)
    if limit.share == 1.0:
        return
    if budget.bytes is not None or budget.share_of_bytes is not None:
        raise BudgetError(f"budget={asked!r}: this server limits budgets to {limit}: give a share or slots per KV head")
    most = int(limit.per_head(seen)[0])
    if min(tokens, int(budget.per_head(seen)[0])) > max(1, most):
        said = "everything is kept" if asked is None else f"budget={asked!r} keeps more"
        raise BudgetError(f"{said} of {tokens} tokens, and this server allows {limit}: ask for a budget within that")
