"""Predicted attention mass of each slot, from the last queries of a row with exponentially decaying weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.errors import CacheStateError
from keepkv.observe import attention
from keepkv.observe.window import window

STATE = "merge_window"  # in view.state: queries remembered for a merge when the score remembers fewer
_TILE = 2**22  # elements of one tile of logits
FAR = 1e30  # of a padded query, whose logits are −inf: −inf − inf would be NaN


def exact_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, otherwise float32: the dtype in which masses and means are computed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class RecentQueries:
    """Queries that predict the future: queries (B,H*G,W,D), positions (B,W), log_eta (B,W) = ln η_j.

    η_j ∝ α^age, summing to 1 over the real queries of a row; −inf for padding.
    """

    queries: Tensor
    positions: Tensor
    log_eta: Tensor

    @property
    def empty(self) -> Tensor:
        """(B,) bool: rows without any query."""
        return ~(self.positions >= 0).any(-1)


def recent(view: LayerView, size: int, alpha: float) -> RecentQueries:
    """The last ``size`` queries of each row: remembered by the score ("window"), for the merge (``STATE``), or
    those of the latest forward. The EMA of the paper (Eq. 8) with its weights made to sum to 1 (divided by
    1−α^size instead of 1−α^t). ``size=1`` is the paper's w = 0."""
    # A score may remember fewer queries than a merge wants; then the method keeps its own.
    own = STATE if STATE in view.state else "window"
    name = next((n for n in ("window", STATE) if n in view.state and view.state[n].shape[2] >= size), own)
    queries, positions = window(view, size, name)
    if positions.shape[1] == 0:
        raise CacheStateError(
            "merging needs the queries that read the cache, and none are known: the compression was deferred and the "
            "score remembers none. Use the method 'keepkv', a score that remembers a window (such as 'snapkv' or "
            "'ema'), or When(prefill='immediate')."
        )
    age = torch.arange(positions.shape[1] - 1, -1, -1, device=positions.device, dtype=exact_dtype(view.slots.keys))
    log_eta = (age * math.log(alpha)).expand(positions.shape).masked_fill(positions < 0, float("-inf"))
    total = log_eta.logsumexp(-1, keepdim=True)
    return RecentQueries(queries, positions, log_eta - total.masked_fill(total.isneginf(), 0.0))


def latest(view: LayerView) -> RecentQueries:
    """The last query of the latest forward alone."""
    positions = view.query_positions[:, -1:]
    return RecentQueries(
        view.queries[:, :, -1:], positions, torch.zeros_like(positions, dtype=exact_dtype(view.slots.keys))
    )


def log_masses(
    view: LayerView, past: RecentQueries, log_z: Tensor | None = None, raw: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean mass of each slot over queries and query heads, as a log (B,H,S), and log Z of each query (B,H,G,W).

    m_i = Σ_j η_j/G Σ_g e^{u_i(q_jg)}/Z_jg / Σ_{j sees i} η_j: normalised attention, averaged over the query heads
    that share the slot, each slot over the queries that could see it (the weight counter N_i). ``raw=True`` leaves
    out Z: the mean of e^u that the paper's EMA takes, in which the query of largest norm dominates. ``log_z`` fixes Z
    where the slots in ``view`` are not the ones that were attended to, such as merged keys.
    """
    b, h, s = view.slots.shape
    g, w = view.query_groups, past.positions.shape[1]
    mass: Tensor | None = None
    z_parts: list[Tensor] = []
    tile = max(1, _TILE // max(1, b * h * g * s))
    for start in range(0, w, tile):
        part = slice(start, start + tile)
        positions, log_eta = past.positions[:, part], past.log_eta[:, part]
        u = attention.logits(view, past.queries[:, :, part], positions)
        z = attention.log_normalizer(view, u) if log_z is None else log_z[..., part]
        z_parts.append(z)
        shift = torch.zeros_like(z) if raw else z.masked_fill(z.isneginf(), 0.0)
        terms = u.sub_((shift - log_eta[:, None, None])[..., None].clamp_(max=FAR)).flatten(2, 3).logsumexp(2)
        mass = terms if mass is None else torch.logaddexp(mass, terms)
    counter = _counter(view, past)
    seen = view.slots.valid & (counter > 0)
    log_n = torch.where(seen, counter, 1.0).log() + math.log(g)
    assert mass is not None
    return torch.where(seen, mass - log_n, float("-inf")), torch.cat(z_parts, dim=-1)


def _counter(view: LayerView, past: RecentQueries) -> Tensor:
    """Σ η_j over the queries that see a slot, those at its position and later: (B,H,S)."""
    eta = past.log_eta.exp()  # (B,W); positions ascend, padding first, where it is 0
    later = torch.nn.functional.pad(eta.flip(-1).cumsum(-1).flip(-1), (0, 1))
    slots = view.slots.positions.flatten(1).to(past.positions.dtype)
    first = torch.searchsorted(past.positions.contiguous(), slots)
    return later.gather(1, first).view(view.slots.shape)


def log_masses_of(view: LayerView, past: RecentQueries, log_z: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    """Log mass (B,H,K) that slots with the given keys (B,H,K,D) and no bias would have had, Z being what it was."""
    slots = view.slots.with_(
        keys=keys, values=keys, log_votes=keys.new_zeros(positions.shape, dtype=torch.float32), positions=positions
    )
    return log_masses(replace(view, slots=slots), past, log_z)[0]
