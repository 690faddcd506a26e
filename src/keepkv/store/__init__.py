"""Stores, one layout per file; importing this package registers them all."""

from keepkv.store import dense, flat, packed, static
from keepkv.store.base import STORES, Store

__all__ = ["STORES", "Store", "dense", "flat", "packed", "static"]
