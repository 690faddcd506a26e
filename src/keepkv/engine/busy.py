"""Which models are in the middle of a forward or of ``generate``, so that nothing is switched under them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from keepkv.engine.contexts import LOCK

_HOOKS = "keepkv_busy"
_running: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # calls of each model, and of models in it
_later: WeakKeyDictionary[nn.Module, Callable[[Any], None]] = WeakKeyDictionary()  # what waits until a model is idle


def watch(model: nn.Module) -> None:
    """Count the forwards of ``model`` from here on, and of models in it; does nothing the second time."""
    for one in _models(model):
        if _HOOKS not in one.__dict__:
            hooks = one.register_forward_pre_hook(_began), one.register_forward_hook(_ended, always_call=True)
            setattr(one, _HOOKS, hooks)


def unwatch(model: nn.Module) -> None:
    """Undo ``watch``."""
    with LOCK:
        for one in _models(model):
            _running.pop(one, None)
            for hook in one.__dict__.pop(_HOOKS, ()):
                hook.remove()


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is busy."""
    _began(model)
    try:
        yield
    finally:
        _ended(model)


def when_idle(model: nn.Module, do: Callable[[Any], None]) -> None:
    """Call ``do`` with ``model`` now, or as soon as all that it is doing has ended."""
    with LOCK:
        _later[model] = do
        _do_what_waits()


def _models(model: nn.Module) -> list[nn.Module]:
    return [one for one in model.modules() if isinstance(one, PreTrainedModel)]


def _began(model: nn.Module, *args: Any) -> None:
    if not torch.compiler.is_compiling():
        with LOCK:
            _running[model] = _running.get(model, 0) + 1


def _ended(model: nn.Module, *args: Any) -> None:
    if not torch.compiler.is_compiling():
        with LOCK:
            _running[model] = max(0, _running.get(model, 0) - 1)  # it may have begun before it was watched
            _do_what_waits()


def _do_what_waits() -> None:
    for model in list(_later):
        if not any(_running.get(one) for one in _models(model)):
            _later.pop(model)(model)
