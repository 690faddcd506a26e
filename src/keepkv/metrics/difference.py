"""How far what a compressed cache gives is from what the full cache gives: distributions, outputs, replies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

ROWS = 64  # distributions held in float64 at once: vocabularies are large


def kl(reference: Tensor, other: Tensor) -> Tensor:
    """(…) float64: KL(reference ‖ other) in nats of the distributions with logits (…,V).

    Swap the arguments for the reverse. A token that ``reference`` excludes (logit −inf) adds nothing; one that only
    ``other`` excludes makes the divergence infinite.
    """
    width = reference.shape[-1]
    blocks = zip(reference.reshape(-1, width).split(ROWS), other.reshape(-1, width).split(ROWS), strict=True)
    return torch.cat([_kl(p, q) for p, q in blocks]).view(reference.shape[:-1])


def _kl(reference: Tensor, other: Tensor) -> Tensor:
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    terms = (p.exp() * (p - q)).masked_fill(p == float("-inf"), 0.0)
    return terms.sum(-1).clamp_min(0.0)  # rounding can leave −1e-17


def top1_agreement(reference: Tensor, other: Tensor) -> Tensor:
    """(…) bool of logits (…,V): equal argmax. Of tied logits the one that torch's argmax picks counts."""
    return reference.argmax(-1) == other.argmax(-1)


def relative_error(reference: Tensor, other: Tensor) -> Tensor:
    """(…) float64: ‖other − reference‖ / ‖reference‖ over the last dimension of (…,D); 0 where both are zero."""
    exact = reference.double()
    size = torch.linalg.vector_norm(exact, dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    error: Tensor = torch.linalg.vector_norm(other.double() - exact, dim=-1) / size
    return error


def common_prefix(reference: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first difference, or before the shorter one ends."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reference, other, strict=False)))
