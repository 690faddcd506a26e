"""Reductions, one file per idea; importing this package registers them all."""

from keepkv.reduce import cam, d2o, drop, grkv, matching, merge, refit, residual  # noqa: F401
from keepkv.reduce.base import REDUCTIONS, Reduce, Reduced, register_reduce

__all__ = ["REDUCTIONS", "Reduce", "Reduced", "register_reduce"]
