"""How far apart two next-token distributions are."""

from __future__ import annotations

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
