"""Several instructions in one prompt: rules for replies, and a rule not to tell them (arXiv 2510.00231).

All texts are written for keepkv, none taken from a benchmark.
"""

from keepkv.tasks.chat import PLAIN, frame_of
from keepkv.tasks.instructions.build import ORDERS, TASK, build
from keepkv.tasks.instructions.defences import ATTACKS, DEFENCES, REFUSAL, refuses
from keepkv.tasks.instructions.directives import FAMILIES, Directive, draw, obey

__all__ = [
    "ATTACKS", "DEFENCES", "FAMILIES", "ORDERS", "PLAIN", "REFUSAL", "TASK", "Directive", "build", "draw",
    "frame_of", "obey", "refuses",
]  # fmt: skip
