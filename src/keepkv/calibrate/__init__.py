"""Calibrations are made here: one file for each kind. Importing this package registers them all."""

from keepkv.calibrate import oscar, query_statistics, tada
from keepkv.calibrate.base import KINDS, Found, Tensors, calibrate, register_kind
from keepkv.calibrate.texts import batches

__all__ = ["KINDS", "Found", "Tensors", "batches", "calibrate", "oscar", "query_statistics", "register_kind", "tada"]
