"""The slot forms of KeepKV: what key and bias a merged slot gets. Pure functions, fp32 or float64.

A group 𝒢 of slots with biased logits u_i = ℓ_i + b_i at one query becomes one slot r (arXiv 2504.09936). With
w̃ = softmax_𝒢(u), k̄ = Σw̃k, v̄ = Σw̃v, ℓ̄ = Σw̃ℓ, L = LSE_𝒢(u), P = Σe^{b_i}:

    zip     k_r = ((L − ln P)/ℓ̄)·k̄   b_r = ln P      Eq. 7, for any number of slots
    bias    k_r = k̄                  b_r = L − ℓ̄     tangent of L: error second order in the query
    fixed   k_r = anchor's key       b_r = L − ℓ_r
    code    k_r = k̄                  b_r = ln P      released code; log mass too large by KL(w̃‖π)

and v_r = v̄ for all. The first three carry the exact mass e^L at the query of the merge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keepkv.kernels.groups import expand_groups, group_logsumexp, group_mean, group_sum

ZIP_MIN_LOGIT = 1e-6  # below this |ℓ̄| the scale (L − ln P)/ℓ̄ means nothing


@dataclass(frozen=True)
class Groups:
    """Statistics of groups at one query, or averaged over queries.

    group (B,H,S) int64: the group of each slot, ``size`` for none. weights (B,H,S): w̃, summing to 1 over a group.
    log_mass (B,H,size): L. log_votes (B,H,size): ln P. logits (B,H,S): ℓ = u − b.
    """

    group: Tensor
    size: int
    weights: Tensor
    log_mass: Tensor
    log_votes: Tensor
    logits: Tensor

    def mean(self, x: Tensor) -> Tensor:
        """Σw̃x over each group: x (B,H,S,D) to (B,H,size,D), in the dtype of the weights."""
        return group_mean(x, self.weights, self.group, self.size)

    def mean_logit(self, logits: Tensor | None = None) -> Tensor:
        """ℓ̄ = Σw̃ℓ over each group (B,H,size)."""
        logits = self.logits if logits is None else logits
        # A member without mass has ℓ = −inf and must add 0, not NaN.
        products = torch.where(self.weights > 0, self.weights * logits, 0.0)
        return group_sum(products, self.group, self.size)


def groups(u: Tensor, log_votes: Tensor, group: Tensor, size: int) -> Groups:
    """Group statistics from log masses ``u`` (B,H,S) and biases ``log_votes`` (B,H,S)."""
    log_votes = log_votes.to(u.dtype)
    log_mass = group_logsumexp(u, group, size)
    floor = log_mass.masked_fill(log_mass.isneginf(), 0.0)
    weights = (u - expand_groups(floor, group)).exp() * (group < size)
    return Groups(group, size, weights, log_mass, group_logsumexp(log_votes, group, size), u - log_votes)


def integer_votes(log_votes: Tensor, group: Tensor, size: int) -> Tensor:
    """ln P of each group (B,H,size) where votes are counts: a sum of integers stays one through any number of merges.

    ln p in float32 is off by up to 5e-7, which over many merges would lose a vote; counts are recovered from it, and
    added, in float64.
    """
    votes = log_votes.to(torch.float32 if log_votes.device.type == "mps" else torch.float64).exp()
    near = votes.round()
    votes = torch.where((votes - near).abs() <= 1e-4 * near, near, votes)
    return group_sum(votes, group, size).log().to(log_votes.dtype)


def zip_scale(g: Groups, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Scale of the mean key of the ``zip`` form, and whether it exists: (B,H,size) each.

    The scale is 1 where it does not exist, |ℓ̄| < 1e-6. It depends on a common shift of the logits, and is negative
    when ℓ̄ and ℓ* = L − ln P differ in sign: at least one ℓ_i ≤ ℓ* then lies on the other side of 0. With a softcap
    the key acts before the cap, so both logits are taken back through it; ℓ* lies between the smallest and the
    largest ℓ_i, hence inside the cap.
    """
    target, mean = g.log_mass - g.log_votes, g.mean_logit()
    if softcap is not None:
        target, mean = uncap(target, softcap), g.mean_logit(uncap(g.logits, softcap))
    exists = (mean.abs() >= ZIP_MIN_LOGIT) & target.isfinite()
    return torch.where(exists, target / torch.where(exists, mean, 1.0), 1.0), exists


def uncap(logits: Tensor, softcap: float) -> Tensor:
    """Logits before the cap that some models put on them, c·tanh(ℓ/c); what rounding put on the cap itself is taken one
    step inside."""
    eps = torch.finfo(logits.dtype).eps
    return torch.atanh((logits / softcap).clamp(-1 + eps, 1 - eps)) * softcap
