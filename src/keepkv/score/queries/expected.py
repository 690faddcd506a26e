"""Expected attention of queries that do not exist yet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Amount, Count, Share, Size, Window, one_of
from keepkv.core.slots import LayerView
from keepkv.observe.gaussian import KIND, query_gaussian, remember_queries, stored_gaussian
from keepkv.observe.lengths import lengths
from keepkv.score.base import Score, register_score


@register_score("expected-attention")
@dataclass(frozen=True)
class ExpectedAttention(Score):
    """Expected Attention (arXiv 2510.00636): weight that the next ``horizon`` queries are expected to give a slot.

    Queries before RoPE are one Gaussian (μ, Σ) per query head and row, over every token seen so far except the
    first ``n_sink`` and padding. With R̄ the mean rotation over positions p₀ … p₀+horizon−1, p₀ that of the next token,
    c the attention scaling and k the cached key,

        s_i = c·(R̄μ)·k_i + ½c²·k_iᵀR̄ΣR̄ᵀk_i,   â = softmax_i(s_i + log votes_i) over slots at position ≥ n_sink,
        S_i = mean_g(â_i + ε·votes_i)·‖v_i‖.

    A slot of p votes stands for p tokens, so it gets the sum of their scores.

    epsilon, epsilon_mode: "absolute" as in the paper, or "relative": ε = epsilon / tokens in the softmax, which means
        the same at every length. use_covariance: without it s is the attention of the mean query.
    value_norm: "v" or None. The paper's ‖W_o v‖, which a score can ask for (``needs_output``), is not here.
    position_average: "rotation" (paper: one mean rotation), "moments" (mean and covariance of the mixture over
        positions, which rotation shrinks), "mixture" (the mixture itself, ``horizon`` passes).
    statistics: "prompt" as above, or "stored": (μ, Σ) of the model's queries on other texts, the same for every row,
        from a calibration of kind "query-statistics". Nothing is then observed while the prompt is read.
    shrinkage: λ of (1−λ)Σ + λ·diag(Σ), or "auto" for D/(D+N); 0 as in the paper.
    chunk: slots scored at a time.

    Softcapped logits are treated to first order (delta method) and a model's attention sinks enter the softmax;
    the paper covers neither. Without RoPE the rotation is the identity. The first ``n_sink`` tokens are kept by
    ``Method.sinks``; their own value here is the weight they would take, at most 1.
    """

    horizon: Window = 512
    n_sink: Count = 4
    epsilon: Amount = 0.0
    epsilon_mode: Annotated[str, one_of("absolute", "relative")] = "absolute"
    use_covariance: bool = True
    value_norm: Annotated[str, one_of("v")] | None = "v"
    position_average: Annotated[str, one_of("rotation", "moments", "mixture")] = "rotation"
    shrinkage: Share | Annotated[str, one_of("auto")] = 0.0
    chunk: Size = 8192
    statistics: Annotated[str, one_of("prompt", "stored")] = "prompt"
    needs_rope: ClassVar[bool] = True

    @property
    def observes(self) -> bool:  # type: ignore[override]
        return self.statistics == "prompt"

    @property
    def needs_calibration(self) -> str | None:  # type: ignore[override]
        return KIND if self.statistics == "stored" else None

    def observe(self, view: LayerView) -> None:
        remember_queries(view, self.n_sink, self.use_covariance)

    def __call__(self, view: LayerView) -> Tensor:
        slots = view.slots
        b, h, _ = slots.shape
        if self.statistics == "stored":
            mean, sigma = stored_gaussian(view, self.use_covariance, self.shrinkage)
        else:
            mean, sigma = query_gaussian(view, self.n_sink, self.use_covariance, self.shrinkage)
        if self.position_average == "moments":
            mean, sigma = self._moments(view, mean, sigma)
        mean = mean.view(b, h, -1, mean.shape[-1])
        sigma = sigma.view(b, h, -1, *sigma.shape[-2:]) if sigma is not None else None
        logits = torch.cat([self._logits(view, k.float(), mean, sigma) for k in slots.keys.split(self.chunk, 2)], -1)
        logits = logits + slots.log_votes[:, :, None].float()
        counted = (slots.valid & (slots.positions >= self.n_sink))[:, :, None]  # (B,H,1,S)
        z = logits.masked_fill(~counted, float("-inf")).logsumexp(-1, keepdim=True)  # (B,H,G,1)
        if view.sink_logits is not None:
            z = torch.logaddexp(z, view.sink_logits.float().view(1, h, -1, 1))
        # Where nothing is counted z is −inf; clamping also keeps the weight of a sink finite.
        expected = (logits - z.masked_fill(z.isneginf(), 0.0)).clamp(max=0.0).exp().mean(2)
        if self.epsilon:
            votes = slots.log_votes.float().exp()
            tokens = (votes * counted[:, :, 0]).sum(-1, keepdim=True).clamp(min=1.0)
            expected = expected + votes * (self.epsilon / tokens if self.epsilon_mode == "relative" else self.epsilon)
        return expected if self.value_norm is None else expected * lengths(slots.values).float()

    def _moments(self, view: LayerView, mean: Tensor, sigma: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Mean and covariance of the mixture, over the horizon, of the rotated Gaussians."""
        if view.rope is None:
            return mean, sigma
        outer = mean[..., :, None] * mean[..., None, :]
        moment = view.rope.average_moment(outer if sigma is None else sigma + outer, view.next_place(), self.horizon)
        mean = view.rope.average(mean, view.next_place(), self.horizon)
        return mean, moment - mean[..., :, None] * mean[..., None, :]

    def _logits(self, view: LayerView, keys: Tensor, mean: Tensor, sigma: Tensor | None) -> Tensor:
        """s (B,H,G,n) of a chunk of keys (B,H,n,D), given (B,H,G,D) and (B,H,G,D,D)."""
        rope = view.rope
        if rope is None or self.position_average == "moments":
            return _log_expectation(view, keys, mean, sigma)
        # Turning the keys back costs O(nD) per KV head; turning Σ forward costs O(D³) per query head.
        if self.position_average == "rotation":
            return _log_expectation(
                view, rope.average(keys, view.next_place(), self.horizon, transpose=True), mean, sigma
            )
        total = None
        for ahead in range(self.horizon):
            back = rope.average(keys, view.next_place() + ahead, 1, transpose=True)
            one = _log_expectation(view, back, mean, sigma)
            total = one if total is None else torch.logaddexp(total, one)
        assert total is not None  # horizon ≥ 1
        return total - math.log(self.horizon)


def _log_expectation(view: LayerView, keys: Tensor, mean: Tensor, sigma: Tensor | None) -> Tensor:
    """log E[exp(logit)] for q ~ N(mean, sigma), (B,H,G,n) float32."""
    s = (mean @ keys.transpose(-1, -2)) * view.scaling
    slope = None
    if view.softcap is not None:
        bent = torch.tanh(s / view.softcap)
        s, slope = bent * view.softcap, 1.0 - bent**2
    if sigma is None:
        return s
    wide = keys[:, :, None]
    spread = ((wide @ sigma) * wide).sum(-1) * (0.5 * view.scaling**2)
    return s + (spread if slope is None else spread * slope**2)
