"""Which ``keepkv.compressed`` a call of ``generate`` stands in: nested, in threads, in tasks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from keepkv.engine.versions import CACHE
from keepkv.errors import CacheStateError

LOCK = threading.RLock()  # held while a model is switched


@dataclass(eq=False)
class Context:
    """An open ``keepkv.compressed``. make: a cache for one call. outer: those that were open around it."""

    make: Callable[[], Any]
    outer: tuple[Context, ...] = ()


_open: WeakKeyDictionary[nn.Module, list[Context]] = WeakKeyDictionary()
_entered: ContextVar[tuple[Context, ...]] = ContextVar("keepkv_entered", default=())


def enter(model: nn.Module, context: Context) -> None:
    """``context`` makes the caches of ``model`` from here on."""
    with LOCK:
        others = _open.setdefault(model, [])
        context.outer = tuple(x for x in _entered.get() if x in others)
        others.append(context)
        _entered.set((*_entered.get(), context))


def leave(model: nn.Module, context: Context) -> None:
    """Undo ``enter``."""
    with LOCK:
        _open[model].remove(context)
        _entered.set(tuple(x for x in _entered.get() if x is not context))


def is_open(model: nn.Module) -> bool:
    """Whether a ``keepkv.compressed`` is open on ``model``, in any thread."""
    return bool(_open.get(model))


def innermost(model: nn.Module) -> Context | None:
    """The one a call stands in; in a thread that has opened none, that of the only thread that has.

    Raises ``CacheStateError`` where several have.
    """
    with LOCK:
        everywhere = _open.get(model, [])
        here = [x for x in _entered.get() if x in everywhere]
        if here or not everywhere:
            return here[-1] if here else None
        last = everywhere[-1]
        if any(x is not last and x not in last.outer for x in everywhere):
            raise CacheStateError(
                "generate was called in a thread without a keepkv.compressed of its own, while several threads have "
                "one open on this model: which is meant cannot be told. Open one in this thread, or pass "
                f"{CACHE}=keepkv.Cache(model, …)."
            )
        return last
