"""Calibrations are made here: one file for each kind. Importing this package registers them all."""

from keepkv.calibrate import gates, low_rank, oscar, q_filters, query_statistics, tada, triattention  # noqa: F401
from keepkv.calibrate.base import KINDS, Found, Tensors, asks, calibrate, register_kind
from keepkv.calibrate.questions import with_questions
from keepkv.calibrate.texts import batches

__all__ = ["KINDS", "Found", "Tensors", "asks", "batches", "calibrate", "register_kind", "with_questions"]
