"""Reductions, one file per idea; importing this package registers them all."""

from keepkv.reduce import (  # noqa: F401
    cam,
    d2o,
    drop,
    grkv,
    kvmerger,
    kvslimmer,
    look_m,
    matching,
    merge,
    refit,
    residual,
    selkv,
    weightedkv,
    zeromerge,
)  # fmt: skip
from keepkv.reduce.base import REDUCTIONS, Reduce, Reduced, register_reduce

__all__ = ["REDUCTIONS", "Reduce", "Reduced", "register_reduce"]
