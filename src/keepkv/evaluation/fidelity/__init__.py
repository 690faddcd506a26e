"""What compression changes, without labels: a compressed cache against the full one on the same text."""

from typing import TYPE_CHECKING

from keepkv.core.lazy import lazily

if TYPE_CHECKING:
    from keepkv.evaluation.fidelity.layers import by_layer
    from keepkv.evaluation.fidelity.measure import fidelity
    from keepkv.evaluation.fidelity.rows import FidelityRow, LayersRow

__all__ = ["FidelityRow", "LayersRow", "by_layer", "fidelity"]

lazily(__name__, {"FidelityRow": "rows", "LayersRow": "rows", "by_layer": "layers", "fidelity": "measure"})
