"""Named methods; importing this package registers them all."""

from keepkv.methods import agnostic, attention, baselines, decoding, fitting, keepkv, keepkv2, keepkv3, merging
from keepkv.methods.base import METHODS, Method, MethodInfo, make_method, method_info, methods, register_method
from keepkv.methods.presets import DEFAULT, PRESETS, Preset

__all__ = [
    "DEFAULT", "METHODS", "PRESETS", "Method", "MethodInfo", "Preset", "agnostic", "attention", "baselines", "decoding",
    "fitting", "keepkv", "keepkv2", "keepkv3", "make_method", "merging", "method_info", "methods", "register_method",
]  # fmt: skip
