"""Reductions, one file per idea; importing this package registers them all."""

from keepkv.reduce import drop
from keepkv.reduce.base import REDUCTIONS, Reduce, Reduced, register_reduce

__all__ = ["REDUCTIONS", "Reduce", "Reduced", "drop", "register_reduce"]
