"""Rectangular store: every head of a row holds the same number of columns."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.store.base import register_store
from keepkv.store.zones import Zones


@register_store("dense")
class DenseStore(Zones):
    """Every (row, head) has the same number of columns; shorter ones start with empty slots."""

    def tensors(self) -> dict[str, Tensor]:
        if self.held.codec.exact is None:
            return {**self.recent.tensors(), **({"counts": self._counts()} if self.recent.fields else {})}
        named = {f"body.{name}": x for name, x in self.coded.tensors().items()}
        named |= {f"pinned.{name}": x for name, x in self.pinned.tensors().items()}
        named |= {f"tail.{name}": x for name, x in self.recent.tensors().items()}
        return {**named, **self.content.tensors(), "appended": torch.tensor([self._appended])} if named else {}

    def _counts(self) -> Tensor:
        return torch.tensor([self.recent.length, self._appended])

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if self.held.codec.exact is None:
            self.recent.restore(tensors)
            self._appended = int(tensors["counts"][1])
            return
        for prefix, zone in (("body.", self.coded), ("pinned.", self.pinned), ("tail.", self.recent)):
            zone.restore({name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)})
        self.content.restore(tensors)
        self._appended = int(tensors["appended"][0])
