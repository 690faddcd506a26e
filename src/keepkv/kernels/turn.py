"""RoPE of vectors that are somewhere already."""

from __future__ import annotations

from torch import Tensor

from keepkv.kernels.dispatch import check, choose
from keepkv.rope import Rope


def turn(x: Tensor, by: Tensor, rope: Rope, *, backend: str | None = None) -> Tensor:
    """``x`` (B,H,T,D), after RoPE, moved ``by`` (B,H,T) positions; in the dtype of ``x``."""
    check(by.shape == x.shape[:-1], f"vectors {tuple(x.shape)} moved by {tuple(by.shape)}: give (B,H,T,D) and (B,H,T)")
    if choose(backend, x) == "reference":
        return rope.turn(x, by)
    from keepkv.kernels.turn_triton import turn as kernel  # Triton is needed only here

    return kernel(x, by, rope)
