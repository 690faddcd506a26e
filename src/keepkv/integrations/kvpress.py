"""A scorer of kvpress as a score of keepkv: batched, padded, with memory freed, on any model that keepkv serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.errors import KeepKVError, UnsupportedInput
from keepkv.score.base import Score

_GIVEN = "from_kvpress gives keys and values"


class MissingInput(KeepKVError):
    """A press looks at something that a cache does not have."""


class _Missing:
    """Stands for what a cache does not have: whoever looks at it is told so."""

    def __init__(self, name: str, press: str) -> None:
        self.__dict__["told"] = (name, press)

    def __getattr__(self, attribute: str) -> NoReturn:
        name, press = self.__dict__["told"]
        _refuse(f"{name}.{attribute}", press)

    def __getitem__(self, index: Any) -> NoReturn:
        _refuse(*self.__dict__["told"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        missing = next(x for x in (*args, *(kwargs or {}).values()) if isinstance(x, cls))
        _refuse(*missing.__dict__["told"])


class _Arguments(dict[str, Any]):
    """The keyword arguments of an attention module, of which there are none."""

    def __init__(self, press: str) -> None:
        super().__init__()
        self.press = press

    def __missing__(self, name: str) -> NoReturn:
        _refuse(f"kwargs[{name!r}]", self.press)


def _refuse(name: str, press: str) -> NoReturn:
    raise MissingInput(
        f"{press} looks at {name}, which a cache does not have: {_GIVEN}. Take keepkv's own method (keepkv methods) or "
        "write a score (keepkv.register_score)."
    )


@dataclass(frozen=True)
class PressScore(Score):
    """What ``ask(keys, values)`` says of the slots of a row, all heads together. press: its name."""

    ask: Callable[[Tensor, Tensor], Tensor]
    press: str

    def __call__(self, view: LayerView) -> Tensor:
        slots = view.slots
        out = torch.zeros(slots.shape, device=slots.positions.device)
        for row, valid in enumerate(slots.valid):
            counts = valid.sum(-1)
            if not bool(counts.any()):
                continue
            if bool((counts != counts[0]).any()):
                raise UnsupportedInput(
                    f"{self.press} scores all heads of a layer together, and here they hold different numbers of "
                    f"slots: {counts.tolist()}. Use it with an allocation that gives each as many, such as 'uniform'."
                )
            keys, values = (x[row][valid].unflatten(0, (len(counts), -1))[None] for x in (slots.keys, slots.values))
            found = self.ask(keys, values)
            if not isinstance(found, Tensor) or found.shape != keys.shape[:3]:
                shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise KeepKVError(f"{self.press}.score returned {shape}: expected scores {tuple(keys.shape[:3])}")
            out[row][valid] = found[0].to(out).flatten()
        return out


def from_kvpress(press: Any) -> Score:
    """The ``score`` of ``press``, a ``ScorerPress`` of kvpress or anything with such a ``score``, for a ``Method``.

        from kvpress import KeyDiffPress
        cache = keepkv.Cache(model, keepkv.Method(keepkv.from_kvpress(KeyDiffPress())), budget=0.3)

    It is asked for one row at a time, without padding: keys and values (1,H,S,D) as they are cached, no attentions. Its
    ``compression_ratio`` means nothing: the budget is the cache's. Raises ``KeepKVError`` here, or where it is asked at
    last, if it looks at something else, such as the attention module or hidden states.
    """
    if isinstance(press, type):
        raise KeepKVError(f"from_kvpress was given the class {press.__name__}. Give a press: {press.__name__}()")
    name = type(press).__name__
    scores = getattr(press, "score", None)
    if not callable(scores):
        inner = " Give the press inside it, and the method of keepkv that does the same, such as 'adakv' or 'chunkkv'."
        raise KeepKVError(f"{name} has no score(module, hidden_states, keys, values, attentions, kwargs).{inner}")

    def ask(keys: Tensor, values: Tensor) -> Tensor:
        module, hidden = _Missing("module", name), _Missing("hidden_states", name)
        try:
            found: Tensor = scores(module, hidden, keys, values, None, _Arguments(name))
        except KeepKVError:
            raise
        except Exception as error:  # whatever a press raises: it is named, with what it said
            raise KeepKVError(f"{name}.score failed ({type(error).__name__}: {error}); {_GIVEN}") from error
        return found

    numbers = torch.arange(2 * 32 * 8).float().sin().view(1, 2, 32, 8)
    try:
        with torch.random.fork_rng(devices=[]):
            ask(numbers, numbers.flip(-1))
    except MissingInput:
        raise
    except KeepKVError:
        pass  # it may be made for keys of another size, or for longer texts: the real ones show
    return PressScore(ask, name)
