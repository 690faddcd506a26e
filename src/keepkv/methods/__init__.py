"""Named methods; importing this package registers them all."""

from keepkv.methods import (
    baselines,
    content,
    decoding,
    fitting,
    heads,
    keepkv,
    keepkv2,
    keepkv3,
    learned,
    merging,
    passes,
    queries,
)
from keepkv.methods.base import METHODS, Method, MethodInfo, make_method, method_info, methods, register_method
from keepkv.methods.presets import DEFAULT, PRESETS, Preset

__all__ = [
    "DEFAULT", "METHODS", "PRESETS", "Method", "MethodInfo", "Preset", "baselines", "content", "decoding", "fitting",
    "heads", "keepkv", "keepkv2", "keepkv3", "learned", "make_method", "merging", "method_info", "methods", "passes",
    "queries", "register_method",
]  # fmt: skip
