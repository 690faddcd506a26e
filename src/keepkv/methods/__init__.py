"""Named methods; importing this package registers them all."""

from keepkv.methods import (
    adaptive,
    attention,
    baselines,
    compactor,
    decoding,
    expected,
    fitting,
    keepkv,
    keepkv2,
    merging,
)
from keepkv.methods.base import METHODS, Method, MethodInfo, method_info, methods, register_method

__all__ = [
    "METHODS",
    "Method",
    "MethodInfo",
    "adaptive",
    "attention",
    "baselines",
    "compactor",
    "decoding",
    "expected",
    "fitting",
    "keepkv",
    "keepkv2",
    "merging",
    "method_info",
    "methods",
    "register_method",
]
