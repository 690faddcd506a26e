"""A prompt that a model reads again and again, where only what compresses it is of interest. Imports torch alone: both
sides of ``peers`` use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


class Replay:
    """While it ``runs``, the linear layers of a model give again what they gave for the first prompt, and attention
    gives zeros: of one attention layer, neither changes a query, a key or a value.

    ``live``: the linear layers compute, for whoever asks them for something else meanwhile.
    """

    def __init__(self, model: Any) -> None:
        self.layers = {name: x for name, x in model.model.named_modules() if isinstance(x, torch.nn.Linear)}
        self.known: dict[str, Tensor] = {}

    @contextmanager
    def runs(self) -> Iterator[None]:
        with patch.object(torch.nn.functional, "scaled_dot_product_attention", _nothing):
            self._put()
            try:
                yield
            finally:
                self._take()

    @contextmanager
    def live(self) -> Iterator[None]:
        self._take()
        try:
            yield
        finally:
            self._put()

    def _put(self) -> None:
        for name, layer in self.layers.items():
            layer.forward = partial(self._again, name, layer)  # type: ignore[method-assign]

    def _take(self) -> None:
        for layer in self.layers.values():
            del layer.forward  # that of the class is left

    def _again(self, name: str, layer: torch.nn.Linear, x: Tensor) -> Tensor:
        if name not in self.known:
            self.known[name] = type(layer).forward(layer, x)
        return self.known[name]


def _nothing(query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Tensor:
    return query.new_zeros(*query.shape[:-1], value.shape[-1])
