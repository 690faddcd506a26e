"""Named methods; importing this package registers them all."""

from keepkv.methods import (
    baselines,
    chunks,
    content,
    decoding,
    fitting,
    heads,
    keepkv,
    keepkv2,
    keepkv3,
    merging,
    outputs,
    passes,
    queries,
)
from keepkv.methods.base import METHODS, Method, MethodInfo, make_method, method_info, methods, register_method
from keepkv.methods.presets import DEFAULT, PRESETS, Preset

__all__ = [
    "DEFAULT", "METHODS", "PRESETS", "Method", "MethodInfo", "Preset", "baselines", "chunks", "content", "decoding",
    "fitting", "heads", "keepkv", "keepkv2", "keepkv3", "make_method", "merging", "method_info", "methods", "outputs",
    "passes", "queries", "register_method",
]  # fmt: skip
