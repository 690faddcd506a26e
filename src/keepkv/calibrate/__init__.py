"""Calibrations are made here: one file for each kind. Importing this package registers them all."""

from keepkv.calibrate import gates, kvzap, low_rank, oscar, query_statistics, tada  # noqa: F401
from keepkv.calibrate.base import KINDS, Found, Tensors, asks, calibrate, register_kind
from keepkv.calibrate.published import published
from keepkv.calibrate.questions import with_questions
from keepkv.calibrate.texts import batches

__all__ = ["KINDS", "Found", "Tensors", "asks", "batches", "calibrate", "published", "register_kind", "with_questions"]
