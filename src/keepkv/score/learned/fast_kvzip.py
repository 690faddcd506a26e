"""What a second reading would attend to in each token, foretold from its hidden state by trained gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from keepkv.core.slots import LayerView
from keepkv.core.stats import Stat
from keepkv.score.base import Score, register_score
from keepkv.score.learned.kvzap import UNKNOWN, check_width, of_heads

KIND, STAT = "fast-kvzip", "fast_kvzip"
PREFIX = "fast_kvzip_"
EPS = 1e-6  # of the norms


@register_score("fast-kvzip")
@dataclass(frozen=True)
class FastKVzip(Score):
    """S_i = mean over g of e^{z_ig} / (e^{z_ig} + Σ_m e^{s_mg}), the share of token i beside M learned sinks, of small
    queries and keys that gates make of its hidden state h_i (arXiv 2601.17668).

    q = norm(W_q h + b_q) (G,R) and k = norm(W_k h) (R) of each KV head; z_g = q_g·k/√R + b_g; s_mg = q_g·k_m/√R with
    learned k_m. The gates are trained to foretell KVzip's score: by ``keepkv calibrate fast-kvzip``, or by the authors
    (``--from``). Statistic ``fast_kvzip``: known when the token is; the largest where slots merge.
    """

    stats: ClassVar[dict[str, Stat]] = {STAT: Stat(UNKNOWN, "max")}
    needs_hidden: ClassVar[bool] = True
    needs_calibration: ClassVar[str | None] = KIND

    def token_stats(self, hidden: Tensor, calibration: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        assert calibration is not None
        w = {name.removeprefix(PREFIX): x for name, x in calibration.items() if name.startswith(PREFIX)}
        check_width(KIND, w["q_proj.weight"].shape[1], hidden)
        (h, _, m, r), (b, t, _) = w["k_base"].shape, hidden.shape
        x = hidden.to(torch.promote_types(hidden.dtype, w["q_proj.weight"].dtype))
        w = {name: y.to(x.dtype) for name, y in w.items()}
        queries = normed(linear(x, w["q_proj.weight"], w["q_proj.bias"]).view(b, t, h, -1, r), w["q_norm.weight"])
        keys = normed(linear(x, w["k_proj.weight"]).view(b, t, h, 1, r), w["k_norm.weight"])
        own = ((queries * keys).sum(-1) / r**0.5 + w["b"][:, 0]).float()  # (B,T,H,G)
        sinks = (torch.einsum("bthgr,hmr->bthgm", queries, w["k_base"][:, 0]) / r**0.5).float()
        share = torch.sigmoid(own - sinks.logsumexp(-1)) if m else torch.ones_like(own)
        return {STAT: share.mean(-1).transpose(1, 2)}

    def __call__(self, view: LayerView) -> Tensor:
        return of_heads(view, STAT)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` (…,R) over its root mean square, times ``weight`` (R,)."""
    wide = x.float()
    return weight * (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)
