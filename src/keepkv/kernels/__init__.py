"""Fused kernels: functions on tensors, for any engine.

Each kernel is a folder: ``__init__`` checks the arguments and decides what computes, ``reference`` is plain torch, and
``triton`` must agree with it. Nothing needs Triton or a GPU: without them the references compute the same.
"""

from keepkv.kernels.assign import nearest_key
from keepkv.kernels.decode import Decoded, decode_attention
from keepkv.kernels.dispatch import choose
from keepkv.kernels.leverage import key_leverage
from keepkv.kernels.merge import Merged, merge_groups
from keepkv.kernels.packed import decode_packed
from keepkv.kernels.paged import PagedSlots, paged_attention
from keepkv.kernels.window import window_scores

__all__ = [
    "Decoded", "Merged", "PagedSlots", "choose", "decode_attention", "decode_packed", "key_leverage", "merge_groups",
    "nearest_key", "paged_attention", "window_scores",
]  # fmt: skip
