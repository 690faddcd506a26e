"""Allocations, one file per idea; importing this package registers them all."""

from keepkv.allocate.adakv import AdaKV, Pooled
from keepkv.allocate.base import ALLOCATIONS, Allocate, register_allocate
from keepkv.allocate.composite import Composite
from keepkv.allocate.curves import Curves
from keepkv.allocate.density import Density
from keepkv.allocate.first_layers import FirstLayers
from keepkv.allocate.per_layer import PerLayer
from keepkv.allocate.profile import HeadBudget
from keepkv.allocate.pyramid import Pyramid
from keepkv.allocate.ranked import LazyLayers, RetrievalHeads
from keepkv.allocate.select import keep_mask
from keepkv.allocate.threshold import Threshold
from keepkv.allocate.uniform import Uniform

__all__ = [
    "ALLOCATIONS", "AdaKV", "Allocate", "Composite", "Curves", "Density", "FirstLayers", "HeadBudget", "LazyLayers",
    "PerLayer", "Pooled", "Pyramid", "RetrievalHeads", "Threshold", "Uniform", "keep_mask", "register_allocate",
]  # fmt: skip
