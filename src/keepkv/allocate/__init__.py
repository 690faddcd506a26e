"""Allocations, one file per idea; importing this package registers them all."""

from keepkv.allocate import uniform
from keepkv.allocate.base import ALLOCATIONS, Allocate, register_allocate

__all__ = ["ALLOCATIONS", "Allocate", "register_allocate", "uniform"]
