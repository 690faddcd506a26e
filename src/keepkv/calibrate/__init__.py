"""Calibrations are made here: one file for each kind. Importing this package registers them all."""

from keepkv.calibrate import (  # noqa: F401
    behaviours,
    fast_kvzip,
    gates,
    kvzap,
    low_rank,
    oscar,
    q_filters,
    query_statistics,
    restore,
    tada,
    triattention,
)
from keepkv.calibrate.base import KINDS, Found, Tensors, asks, calibrate, hides, register_kind
from keepkv.calibrate.needles import Needle, with_needles
from keepkv.calibrate.published import published
from keepkv.calibrate.questions import Exchange, with_questions
from keepkv.calibrate.texts import batches

__all__ = [
    "KINDS", "Exchange", "Found", "Needle", "Tensors", "asks", "batches", "calibrate", "hides", "published",
    "register_kind", "with_needles", "with_questions",
]  # fmt: skip
