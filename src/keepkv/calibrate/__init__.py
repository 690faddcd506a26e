"""Calibrations are made here: one file for each kind. Importing this package registers them all."""

from keepkv.calibrate import behaviours, gates, low_rank, oscar, query_statistics, tada  # noqa: F401
from keepkv.calibrate.base import KINDS, Found, Tensors, asks, calibrate, hides, register_kind
from keepkv.calibrate.needles import Needle, with_needles
from keepkv.calibrate.questions import with_questions
from keepkv.calibrate.texts import batches

__all__ = [
    "KINDS", "Found", "Needle", "Tensors", "asks", "batches", "calibrate", "hides", "register_kind", "with_needles",
    "with_questions",
]  # fmt: skip
