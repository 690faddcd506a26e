"""Measuring what compression changes, reproducibly: every row says what it was made with."""

from keepkv.evaluation.fidelity.measure import fidelity
from keepkv.evaluation.rows import FidelityRow

__all__ = ["FidelityRow", "fidelity"]
