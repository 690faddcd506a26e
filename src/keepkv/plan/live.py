"""How many bytes of tensors are alive at once, of tensors with memory and of those without (device "meta")."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Place = tuple[tuple[CodeType, int], ...]

# Bytes that operators need inside: what is exponentiated, and which rows are masked as a whole.
_INSIDE: dict[Any, Callable[[Tensor], int]] = {
    torch.ops.aten.logsumexp.default: lambda x: x.nbytes,
    torch.ops.aten._safe_softmax.default: Tensor.numel,
}
_NUMBER = torch.ops.aten._local_scalar_dense.default
_NONZERO = torch.ops.aten.nonzero.default
_GROUPED = torch.ops.aten._grouped_mm.default


class Live(TorchDispatchMode):
    """``with Live() as live: …``: ``live.now`` and ``live.peak`` count the bytes of tensors that were made inside.

    What was there before counts nothing, nor what operators need inside, but for two of which that is much.
    answer: to whoever asks whether anything in a tensor without memory is true: whether slots have votes, that is.
    places: where it is a dict, it gets the most bytes at each place of the source that calls torch, by the lines that
    lead there.
    """

    def __init__(self, answer: bool = False) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.answer = answer
        self.places: dict[Place, int] | None = None
        self._known: dict[int, int] = {}
        self._watched = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._meet(x, counts=False)
        made = self._by_shape(func, args) if args and isinstance(args[0], Tensor) and args[0].is_meta else None
        made = func(*args, **(kwargs or {})) if made is None else made
        for x in tree_leaves(made):
            if isinstance(x, Tensor):
                self._meet(x, counts=True)
        if self._watched:
            most = self.now + (_INSIDE[func](args[0]) if func in _INSIDE else 0)
            self.peak = max(self.peak, most)
            if self.places is not None:
                place = tuple(_lines(sys._getframe(1)))
                self.places[place] = max(self.places.get(place, 0), most)
        return made

    def _meet(self, x: Tensor, counts: bool) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes() if counts else 0
            self.now += self._known[key]
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)

    def restart(self) -> None:
        """Measure the peak from here."""
        self.peak = self.now

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Inside, tensors may come and go without a peak: what is left at the end counts."""
        before, self._watched = self._watched, False
        try:
            yield
        finally:
            self._watched = before

    def _by_shape(self, func: Any, args: Any) -> Any:
        """What an operator makes of tensors without memory where torch cannot say."""
        first = args[0]
        if func is _NUMBER:
            return self.answer
        if func is _NONZERO:  # every slot is one
            return first.new_empty(first.numel(), first.dim(), dtype=torch.int64)
        return first.new_empty(first.shape[0], args[1].shape[-1]) if func is _GROUPED else None


def _lines(frame: FrameType | None) -> Iterator[tuple[CodeType, int]]:
    """Code and line of ``frame`` and of those that called it, the nearest first."""
    while frame is not None:
        yield frame.f_code, frame.f_lineno
        frame = frame.f_back


class Fused(TorchFunctionMode):
    """Attention of tensors without memory takes what fused kernels take: no logits, and a mask in the query's dtype.

    cpu: as on CPUs, where torch has no fused kernel for values of another width than keys.
    """

    def __init__(self, cpu: bool = False) -> None:
        super().__init__()
        self.cpu = cpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention or not args[0].is_meta:
            return func(*args, **kwargs)
        query, _, value, *rest = args
        if self.cpu and value.shape[-1] != query.shape[-1]:
            return func(*args, **kwargs)  # which computes every logit there
        mask = rest[0] if rest else kwargs.get("attn_mask")
        bias = mask.to(query.dtype) if mask is not None and mask.dtype == torch.bool else None
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        del bias, sums
        return out
