"""What compression changes, without labels: a compressed cache against the full one on the same text."""

from keepkv.evaluation.fidelity.measure import fidelity
from keepkv.evaluation.fidelity.rows import FidelityRow

__all__ = ["FidelityRow", "fidelity"]
