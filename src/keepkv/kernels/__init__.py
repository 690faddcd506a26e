"""Fused kernels, each beside the plain torch that it must agree with: functions on tensors, for any engine.

Nothing here is required: without Triton or a GPU the same functions compute the same by their references.
"""

from keepkv.kernels.assign import assign
from keepkv.kernels.decode import Decoded, decode
from keepkv.kernels.dispatch import choose
from keepkv.kernels.leverage import leverage
from keepkv.kernels.merge import Merged, merge_segments
from keepkv.kernels.window import window_scores

__all__ = [
    "Decoded", "Merged", "assign", "choose", "decode", "leverage", "merge_segments", "window_scores",
]  # fmt: skip
