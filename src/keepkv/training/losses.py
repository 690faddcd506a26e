"""Losses over the tokens of replies."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div


def divergence(student: Tensor, teacher: Tensor, graded: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) of logits (B,W,V) over ``temperature``, summed over the positions ``graded`` (B,W) bool,
    mean over rows, times the temperature squared (arXiv 2512.00504, §10.3 of our specification). In float32."""
    ours, theirs = ((x[graded].float() / temperature).log_softmax(-1) for x in (student, teacher))
    return kl_div(ours, theirs, reduction="sum", log_target=True) * temperature**2 / len(graded)


def likelihood(student: Tensor, tokens: Tensor, graded: Tensor) -> Tensor:
    """Cross-entropy of ``tokens`` (B,W) under logits (B,W,V), mean over the positions ``graded`` (B,W) bool."""
    return cross_entropy(student[graded].float(), tokens[graded])
