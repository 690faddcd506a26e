"""How far an attention output is from what it should be."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(reference: Tensor, other: Tensor) -> Tensor:
    """(…) float64: ‖other − reference‖ / ‖reference‖ over the last dimension of (…,D); 0 where both are zero."""
    exact = reference.double()
    size = torch.linalg.vector_norm(exact, dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    error: Tensor = torch.linalg.vector_norm(other.double() - exact, dim=-1) / size
    return error
