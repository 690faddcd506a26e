"""Kinds "sals" and "loki": a few coordinates that say most of a key (arXiv 2510.24273, 2406.02542)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.calibrate.base import Found, Tensors, register_kind
from keepkv.core.options import Count
from keepkv.core.slots import LayerView
from keepkv.engine.cache import Cache
from keepkv.engine.passes.reread import feed
from keepkv.errors import CalibrationError, UnsupportedModel
from keepkv.methods import Method
from keepkv.score.base import Score
from keepkv.select.low_rank import Loki
from keepkv.store.codec.sals import KIND

SINKS = 4  # first tokens of each text that are left out: their keys are like no other
QUERIES = 32  # of the end of a text that recall is measured with
HELD_OUT = 4  # every so manieth piece of text is not fitted to
SHARES = (1 / 4, 1 / 8)  # of d, of which the record says how well they do


@dataclass(frozen=True)
class Look(Score):
    """Remembers the newest queries; scores nothing."""

    needs_rope: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        view.state["queries"] = view.queries[:, :, -QUERIES:].clone()


@dataclass
class Moments:
    """Sums over vectors (N,W), float64: how many, Σx (W,), Σxxᵀ (W,W)."""

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    square: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: Tensor) -> None:
        x = x.cpu().double()
        self.count, self.total, self.square = self.count + len(x), self.total + x.sum(0), self.square + x.mT @ x

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(W,W), around the mean."""
        return self.square / self.count - self.mean[:, None] * self.mean


@dataclass
class Read:
    """Keys (B,H,S,D) and the last queries (B,H,G,T,D) of one text in one layer, before RoPE, sinks left out."""

    keys: Tensor
    queries: Tensor

    @property
    def joint(self) -> Tensor:
        """Keys of all heads side by side, (B·S,H·D)."""
        return self.keys.transpose(1, 2).flatten(2).flatten(0, 1)


def _reads(model: PreTrainedModel, texts: Iterable[Tensor], rotated: bool = False) -> Iterator[dict[int, Read]]:
    """Each text by layer. rotated: keys and queries after RoPE."""
    cache = Cache(model, Method(Look()), 1.0).copy(observing=True)
    if any(layer.form.model_expands for layer in cache.compressible):
        raise UnsupportedModel(f"{type(model).__name__} caches latents of its own: there is no basis of keys to find")
    for ids in texts:
        cache.reset()
        feed(model, cache, ids, ids.new_ones(len(ids), 0))
        found = {}
        for layer in cache.compressible:
            slots, queries, rope = layer.store.view(), layer.score_state["queries"].float(), layer.info.rope
            keys, end = slots.keys.float(), ids.shape[1]
            if rope is not None and not rotated:
                keys = rope.of_text.unrotate(keys, slots.positions)
                queries = rope.of_text.unrotate(queries, torch.arange(end - queries.shape[2], end, device=ids.device))
            grouped = queries.unflatten(1, (keys.shape[1], -1))
            found[layer.info.index] = Read(keys[:, :, SINKS:], grouped)
        yield found


def _split(texts: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Texts to fit to, and others."""
    long = [x for x in texts if x.shape[1] > SINKS + 1]
    if not long:
        raise CalibrationError(f"no text is longer than the {SINKS} tokens that are left out: give longer texts")
    out = long[HELD_OUT - 1 :: HELD_OUT]
    return [x for i, x in enumerate(long) if i % HELD_OUT != HELD_OUT - 1], out


@register_kind(KIND)
@torch.no_grad()
def sals(model: PreTrainedModel, batches: Iterable[Tensor], rank: Count = 0, weighted: bool = False) -> Found:
    """Per layer: ``sals_mean`` (H,D) and ``sals_basis`` (d,r) of keys before RoPE, all d = H·D numbers of a token
    together, float32; with ``weighted`` also ``sals_into`` (d,r).

    Eigenvectors of the covariance C_k in float64, by falling eigenvalue. rank: r, columns that are written; 0: all d.
    weighted: of C_q^½·C_k·C_q^½, with C_q the second moments of the queries of each KV head: what is left out costs
    logits least. Then keys are multiplied with ``sals_into`` = C_q^½·W, and rebuilt by ``sals_basis`` = C_q^−½·W.
    Every fourth piece of text is held out, and tells how well the basis does there.
    """
    fit, rest = _split(list(batches))
    keys: dict[int, Moments] = {}
    asked: dict[int, list[Moments]] = {}
    widths: dict[int, torch.Size] = {}
    for read in _reads(model, fit):
        for i, x in read.items():
            keys.setdefault(i, Moments()).add(x.joint)
            widths[i] = x.keys.shape[1:2] + x.keys.shape[3:]
            for head, one in enumerate(asked.setdefault(i, [Moments() for _ in range(x.keys.shape[1])])):
                one.add(x.queries[:, head].flatten(0, 2))
    made: Tensors = {}
    for i, moments in keys.items():
        root = _roots(asked[i]) if weighted else torch.eye(len(moments.total), dtype=torch.float64)
        _, vectors = torch.linalg.eigh(root @ moments.covariance @ root)
        vectors = vectors.flip(-1)[:, : rank or None]
        back = torch.linalg.solve(root, vectors)
        made[i] = {"sals_mean": moments.mean.view(widths[i]).float(), "sals_basis": back.float().contiguous()}
        made[i] |= {"sals_into": (root @ vectors).float().contiguous()} if weighted else {}
    rows = {i: {"layer": i, "fitted": _energies(made[i], keys[i])} for i in made}
    held: dict[int, Moments] = {}
    recalls: dict[int, list[list[float]]] = {}
    for read in _reads(model, rest):
        for i, x in read.items():
            held.setdefault(i, Moments()).add(x.joint)
            recalls.setdefault(i, []).append(_recalls(made[i], x))
    for i, moments in held.items():
        rows[i]["held_out"] = _energies(made[i], moments)
        rows[i]["recall"] = torch.tensor(recalls[i]).mean(0).tolist()
    return Found(
        made, {"layers": list(rows.values()), "shares": list(SHARES), "pieces": [len(fit), len(rest)]}, _said(rows)
    )


def _roots(queries: list[Moments]) -> Tensor:
    """C_q^½ (d,d), a block for each KV head; a thousandth of the mean eigenvalue is added, so it has an inverse."""
    blocks = []
    for one in queries:
        second = one.square / one.count
        values, vectors = torch.linalg.eigh(second)
        least = values.mean().clamp_min(1e-12) * 1e-3
        blocks.append(vectors * (values.clamp_min(0) + least).sqrt() @ vectors.mT)
    roots: Tensor = torch.block_diag(*blocks)
    return roots


def _energies(made: dict[str, Tensor], x: Moments) -> list[float]:
    """Share of the energy of keys around μ that rank d·share rebuilds, for each of ``SHARES``."""
    mean, back = made["sals_mean"].double().flatten(), made["sals_basis"].double()
    into = made.get("sals_into", back).double()
    away = x.square / x.count - x.mean[:, None] * mean - mean[:, None] * x.mean + mean[:, None] * mean
    found = []
    for share in SHARES:
        r = max(1, round(len(mean) * share))
        lost = torch.eye(len(mean), dtype=torch.float64) - into[:, :r] @ back[:, :r].mT  # x − x̂ of a row x
        found.append(float(1 - (lost.mT @ away @ lost).trace() / away.trace().clamp_min(1e-30)))
    return found


def _recalls(made: dict[str, Tensor], x: Read) -> list[float]:
    """Of the eighth of the tokens with the greatest Σ_h q̄_h·k_h, the share that half of d·share coordinates find."""
    back, mean = made["sals_basis"].to(x.keys.device), made["sals_mean"].to(x.keys.device).flatten()
    into, query = (
        made.get("sals_into", made["sals_basis"]).to(x.keys.device),
        x.queries.mean(2).transpose(1, 2).flatten(2),
    )
    keys = x.keys.transpose(1, 2).flatten(2)
    n, found = max(1, keys.shape[1] // 8), []
    best = torch.zeros(query.shape[0], query.shape[1], keys.shape[1]).to(keys)
    best.scatter_(2, (query @ keys.mT).topk(n, -1).indices, 1.0)
    for share in SHARES:
        r = max(1, round(back.shape[0] * share) // 2)
        scores = (query @ back[:, :r]) @ ((keys - mean) @ into[:, :r]).mT
        found.append(float(best.gather(2, scores.topk(n, -1).indices).mean()))
    return found


def _said(rows: dict[int, dict[str, Any]]) -> list[str]:
    """A line a layer."""
    if not any("held_out" in row for row in rows.values()):
        return [f"too little text to hold any out: give {HELD_OUT} pieces or more to see how well the basis does"]
    lines = [
        "energy: of keys before RoPE that rank d/4 (d/8) rebuilds. recall: of the eighth of the tokens that score",
        "most, the share that half of these coordinates find",
        "layer  energy, fitted   held out         recall, held out",
    ]
    for row in rows.values():
        cells = [f"{a:6.3f} ({b:5.3f})" for a, b in (row["fitted"], row["held_out"], row["recall"])]
        lines.append(f"{row['layer']:5}  {'   '.join(cells)}")
    return lines


@register_kind(Loki.needs_calibration or "")
@torch.no_grad()
def loki(model: PreTrainedModel, batches: Iterable[Tensor]) -> Tensors:
    """Per layer: ``loki_basis`` (H,D,D), principal directions of the rotated keys of each head, by falling eigenvalue,
    float32."""
    heads: dict[int, list[Moments]] = {}
    for read in _reads(model, _split([*batches])[0], rotated=True):
        for i, x in read.items():
            for head, one in enumerate(heads.setdefault(i, [Moments() for _ in range(x.keys.shape[1])])):
                one.add(x.keys[:, head].flatten(0, 1))
    bases = {i: [torch.linalg.eigh(x.square / x.count)[1].flip(-1) for x in some] for i, some in heads.items()}
    return {i: {"loki_basis": torch.stack(some).float().contiguous()} for i, some in bases.items()}
