"""Ridge leverage of keys before RoPE, without a copy of the keys."""

from __future__ import annotations

from torch import Tensor

from keepkv.core.rope import Rope
from keepkv.kernels.dispatch import check, choose
from keepkv.kernels.leverage import reference

__all__ = ["key_leverage"]


def key_leverage(
    keys: Tensor,
    positions: Tensor,
    log_votes: Tensor | None = None,
    *,
    ridge: float,
    rope: Rope | None = None,
    sample: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """ℓ_i = k̃_iᵀ(Σ + λI)⁻¹k̃_i of each slot among those of its row and head, as ``score.content.leverage`` wants it.

    keys (B,H,S,D) after ``rope``, which is None where they are not rotated, at positions (B,H,S), below 0 where a slot
    is empty. k̃ are the keys before it less their mean, Σ their covariance, λ = ``ridge``·tr Σ/D; a slot counts
    e^``log_votes`` (B,H,S) times. Mean and covariance are those of ``sample`` valid slots of each head, evenly spaced:
    of all where there are no more, or where it is None. Returns float32 (B,H,S), float64 for float64; 0 at empty slots.
    Raises ``UnsupportedInput`` where shapes do not fit together. backend: see ``dispatch.choose``.
    """
    check(
        keys.dim() == 4 and positions.shape == keys.shape[:-1],
        f"keys {tuple(keys.shape)} with positions {tuple(positions.shape)}: give (B,H,S,D) and (B,H,S)",
    )
    check(log_votes is None or log_votes.shape == positions.shape, "log_votes and positions must have the same shape")
    check(sample is None or sample > 0, f"sample={sample}: give at least 1 slot, or None for all")
    at = reference.evenly_spaced(positions >= 0, sample)
    if choose(backend, keys) == "reference":
        return reference.key_leverage(keys, positions, log_votes, ridge, rope, at)
    from keepkv.kernels.leverage import triton  # only here, since Triton may be missing

    return triton.key_leverage(keys, positions, log_votes, ridge, rope, at)
