"""What compression changes, without labels: a compressed cache against the full one on the same text."""

from typing import TYPE_CHECKING

from keepkv.core.lazy import lazily

if TYPE_CHECKING:
    from keepkv.evaluation.fidelity.measure import fidelity
    from keepkv.evaluation.fidelity.rows import FidelityRow

__all__ = ["FidelityRow", "fidelity"]

lazily(__name__, {"FidelityRow": "rows", "fidelity": "measure"})
