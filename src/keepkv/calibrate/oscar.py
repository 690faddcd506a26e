"""Kind "oscar": rotations of keys and values for 2-bit codes, fitted to what attention does (arXiv 2605.17757, §3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.calibrate.base import Found, register_kind
from keepkv.core.slots import LayerView
from keepkv.engine.cache import Cache
from keepkv.engine.passes.reread import feed
from keepkv.errors import CalibrationError
from keepkv.kernels.codes import Codes
from keepkv.kernels.logits import MASKED, cap_logits
from keepkv.methods import Method
from keepkv.score.base import Score
from keepkv.store.codec.hadamard import hadamard
from keepkv.store.codec.oscar import KIND, NAMES, RANGE
from keepkv.store.codec.per_token import checked_bits, quantise

SINKS = 4  # first tokens of each text that are left out: they are exact in the paper, and like no others
QUERIES = 256  # that attend at once
SAMPLE = 512  # vectors of each head that ranges are fitted on
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


@dataclass(frozen=True)
class Watch(Score):
    """Remembers Σ q·qᵀ of the queries and Σ o·oᵀ of attention's outputs, by KV head; scores nothing."""

    observes: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        for start in range(0, view.queries.shape[2], QUERIES):
            at = slice(start, start + QUERIES)
            queries, positions = view.queries[:, :, at], view.query_positions[:, at]
            real = (positions >= SINKS)[:, None, :, None]
            for name, x in (("asked", queries), ("said", _outputs(view, queries, positions))):
                x = (x * real).double().unflatten(1, (-1, view.query_groups)).flatten(2, 3)
                moment = x.mT @ x
                view.state[name] = moment if name not in view.state else view.state[name] + moment


def _outputs(view: LayerView, queries: Tensor, positions: Tensor) -> Tensor:
    """Attention's outputs (B,Hq,T,Dv) of ``queries`` (B,Hq,T,D) at ``positions`` (B,T)."""
    slots, groups = view.slots, view.query_groups
    keys, values = (x.float().repeat_interleave(groups, 1) for x in (slots.keys, slots.values))
    unseen = slots.positions[:, :, None] > positions[:, None, :, None]
    logits = cap_logits(queries.float() @ keys.mT * view.scaling, view.softcap)
    return logits.masked_fill_(unseen.repeat_interleave(groups, 1), MASKED).softmax(-1) @ values


@register_kind(KIND)
@torch.no_grad()
def oscar(model: PreTrainedModel, batches: Iterable[Tensor], bits: int = 2) -> Found:
    """Per layer: ``oscar_keys`` (H,D,D) and ``oscar_values`` (H,Dv,Dv), what codes are multiplied with when they are
    read; ``oscar_range`` (2,), how much of the range of keys and of values has codes.

    bits: of the codes that ranges are fitted for. Taken over every token of the texts but the first four of each.
    Raises ``CalibrationError`` for models that cache latents.
    """
    checked_bits(bits)
    cache = Cache(model, Method(Watch()), 1.0).copy(observing=True)
    if any(layer.form.one_content for layer in cache.compressible):
        raise CalibrationError(f"{type(model).__name__} caches one latent for keys and values: give another codec")
    moments: dict[int, dict[str, Tensor]] = {}
    sample: dict[int, dict[str, Tensor]] = {}
    for ids in batches:
        cache.reset()
        feed(model, cache, ids, ids.new_ones(len(ids), 0))
        for layer in cache.compressible:
            i, slots = layer.info.index, layer.store.view()
            if slots.shape[2] <= SINKS:
                continue
            found = {name: layer.score_state[name].sum(0) for name in ("asked", "said")}
            moments[i] = {name: x + moments[i][name] for name, x in found.items()} if i in moments else found
            if i not in sample:
                new = {"keys": slots.keys, "values": slots.values}
                sample[i] = {name: x[0, :, SINKS:].float()[:, -SAMPLE:] for name, x in new.items()}
    if not moments and cache.compressible:
        raise CalibrationError(f"no text is longer than the {SINKS} tokens that are left out: give longer texts")
    tensors: dict[int, dict[str, Tensor]] = {}
    rows: list[dict[str, Any]] = []
    for i, held in moments.items():
        turns, ranges = {}, []
        for name, moment in (("keys", held["asked"]), ("values", held["said"])):
            turns[NAMES[name]] = turn = rotation(moment).float()
            losses = [_loss(sample[i][name], turn, moment.float(), bits, x) for x in RANGES]
            plain = _loss(sample[i][name], hadamard(turn.shape[-1], turn.device), moment.float(), bits, 1.0)
            best = min(range(len(RANGES)), key=losses.__getitem__)
            ranges.append(RANGES[best])
            rows.append({"layer": i, "of": name, "range": RANGES[best], "loss": losses[best] / max(plain, 1e-30)})
        tensors[i] = {name: x.cpu() for name, x in turns.items()} | {RANGE: torch.tensor(ranges)}
    return Found(tensors, {"layers": rows}, _said(rows, bits))


def rotation(moment: Tensor) -> Tensor:
    """Rᵀ = (U·H·P)ᵀ of each head, (H,W,W): U the eigenvectors of ``moment`` (H,W,W), largest first, H a Hadamard matrix
    with random signs, P the order of reversed bits where W is a power of two."""
    width = moment.shape[-1]
    vectors = torch.linalg.eigh(moment).eigenvectors.flip(-1)
    turn = vectors @ hadamard(width, moment.device).to(moment.dtype).mT
    back: Tensor = turn[..., _reversed_bits(width)].mT.contiguous()
    return back


def _reversed_bits(width: int) -> list[int]:
    if width & (width - 1):
        return list(range(width))
    size = width.bit_length() - 1
    return [int(f"{i:0{size}b}"[::-1], 2) if size else 0 for i in range(width)]


def _loss(x: Tensor, turn: Tensor, moment: Tensor, bits: int, range_: float) -> float:
    """Σ eᵀ·M·e of what vectors ``x`` (H,S,W) lose in codes: the squared error of what attention makes of them."""
    codes, scale, zero = quantise(x @ turn.mT, bits, 1, range_)
    away = Codes(codes, scale, zero, bits, x.shape[-1], turn=turn).expand(torch.float32) - x
    return float(((away @ moment) * away).sum())


def _said(rows: list[dict[str, Any]], bits: int) -> list[str]:
    lines = [f"error of what attention makes of {bits}-bit codes, over that of a Hadamard rotation; range with codes"]
    for name in NAMES:
        own = [row for row in rows if row["of"] == name]
        mean = sum(row["loss"] for row in own) / max(1, len(own))
        ranges = " ".join(f"{row['range']:g}" for row in own)
        lines.append(f"{name:7} {mean:.2f} on the mean over {len(own)} layers; {ranges}")
    return lines
