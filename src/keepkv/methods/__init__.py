"""Named methods; importing this package registers them all."""

from keepkv.methods import (  # noqa: F401 imported to register
    baselines,
    chunks,
    content,
    decoding,
    fitting,
    heads,
    learned,
    merging,
    outputs,
    own,
    passes,
    queries,
    vision,
)
from keepkv.methods.base import METHODS, Method, MethodInfo, make_method, method_info, methods, register_method
from keepkv.methods.presets import DEFAULT, PRESETS, Preset

__all__ = [
    "DEFAULT", "METHODS", "PRESETS", "Method", "MethodInfo", "Preset", "make_method", "method_info", "methods",
    "register_method",
]  # fmt: skip
