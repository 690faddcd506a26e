"""Measuring what compression changes, reproducibly: every row says what it was made with.

``evaluate`` scores the methods of a ``Setup``, each a ``Variant``, on its tasks; ``fidelity`` compares with the full
cache, without labels; ``leakage`` asks which instructions survive. Who only reads rows imports no model code.
"""

from typing import TYPE_CHECKING

from keepkv.core.lazy import lazily

if TYPE_CHECKING:
    from keepkv.evaluation.fidelity import FidelityRow, fidelity
    from keepkv.evaluation.runner import evaluate
    from keepkv.evaluation.setup import Setup, Variant

__all__ = ["FidelityRow", "Setup", "Variant", "evaluate", "fidelity"]

# The name of the folder is here the function of that name, as it has long been. ``keepkv.evaluation.fidelity`` in an
# import statement is the folder, which has the same function in it.
lazily(
    __name__,
    {
        "FidelityRow": "fidelity", "fidelity": "fidelity", "evaluate": "runner", "Setup": "setup", "Variant": "setup",
    },
)  # fmt: skip
