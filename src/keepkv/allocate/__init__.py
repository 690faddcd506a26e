"""Allocations, one file per idea; importing this package registers them all."""

from keepkv.allocate.adakv import AdaKV, Pooled
from keepkv.allocate.base import ALLOCATIONS, Allocate, register_allocate
from keepkv.allocate.composite import Composite
from keepkv.allocate.pyramid import Pyramid
from keepkv.allocate.select import keep_mask
from keepkv.allocate.threshold import Threshold
from keepkv.allocate.uniform import Uniform

__all__ = [
    "ALLOCATIONS", "AdaKV", "Allocate", "Composite", "Pooled", "Pyramid", "Threshold", "Uniform", "keep_mask",
    "register_allocate",
]  # fmt: skip
