"""What ``Cache.update`` returns instead of dense keys and values."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from keepkv.errors import UnsupportedModel

_REMEDY = (
    "This model uses the cached keys or values outside the attention function, or its attention implementation is "
    "not 'keepkv'. Make the cache with keepkv.Cache(model, …), which switches the model, and do not change the "
    "attention implementation afterwards; if it still fails, the model cannot be served: use transformers' "
    "DynamicCache."
)


class Attends(Protocol):
    """What a handle leads to: a layer that attends over its slots. The way up, on purpose: see ``Layer.attend``."""

    def check_input(self, kwargs: dict[str, Any]) -> None: ...

    def attend(self, module: torch.nn.Module, query: torch.Tensor, rule: Any, **kwargs: Any) -> torch.Tensor: ...


class KVHandle:
    """Stands for the keys (or values) of a layer. Only the keepkv attention function knows what to do with it;
    any tensor operation on it raises, because a dense tensor of past keys does not exist."""

    def __init__(self, layer: Attends, like: torch.Tensor, length: int) -> None:
        self.layer = layer
        self.shape = torch.Size((*like.shape[:2], length, like.shape[3]))
        self.dtype = like.dtype
        self.device = like.device

    def to(self, *args: Any, **kwargs: Any) -> KVHandle:
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UnsupportedModel(f"{getattr(func, '__name__', func)} was called on the keys of a keepkv cache. {_REMEDY}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedModel(f".{name} was read from the keys of a keepkv cache. {_REMEDY}")

    def _refuse(self, *args: Any) -> Any:
        raise UnsupportedModel(f"an operator was applied to the keys of a keepkv cache. {_REMEDY}")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = __rmatmul__ = _refuse
    __getitem__ = __neg__ = __iter__ = __len__ = _refuse
