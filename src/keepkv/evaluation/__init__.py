"""Measuring what compression changes, reproducibly: every row says what it was made with.

``runner`` scores methods on tasks; ``fidelity`` compares with the full cache, without labels; ``leakage`` asks which
instructions survive.
"""

# The name of the folder is here the function of that name, as it has long been. ``keepkv.evaluation.fidelity`` in an
# import statement is the folder, which has the same function in it.
from keepkv.evaluation.fidelity import FidelityRow, fidelity

__all__ = ["FidelityRow", "fidelity"]
