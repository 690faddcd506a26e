"""ThinK: keys without the channels that queries hardly ask for (arXiv 2407.21018)."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Size, above, below
from keepkv.store.codec.base import Codec, Fields, register_codec

CHANNELS, QUERIES = "channels", "queries"  # what slots share: (B,H,1,D) uint8, 1 where kept; (B,H,1,D) float32


@register_codec("think")
class Think(Codec):
    """Of the D channels of the keys of a row and head, the ⌊``pruned``·D⌋ with the least E[q_d²]·E[k_d²] are not held;
    they are read as zeros. Values stay as they are.

    E[q_d²]: over the last ``window`` queries of the prompt, mean over the query heads of the KV head; E[k_d²]: over the
    keys that are written when the channels are chosen, at the end of the first forward that leaves any, up to 1024. The
    choice then stands. The paper takes the norm of the product, ‖q_d k_dᵀ‖, which orders channels as the two apart do.
    The newest 32 to 64 tokens keep all channels, as the paper's recent window does. A slot takes D − ⌊``pruned``·D⌋ +
    Dv numbers in the model's dtype, a row 5·D bytes a head. Where no query was seen, E[k_d²] alone decides.

    Any method combines with it, in any layout that encodes; models that cache one latent for keys and values do not.
    """

    meets_queries: ClassVar[bool] = True

    def __init__(self, pruned: Annotated[float, above(0), below(1)] = 0.4, window: Size = 32) -> None:
        self.pruned, self.window = pruned, window

    def kept(self, width: int) -> int:
        """How many of so many channels are held."""
        return width - math.floor(self.pruned * width + 1e-9)

    def meet(self, queries: Tensor, positions: Tensor, shared: Fields) -> Fields:
        real = (positions[:, -self.window :] >= 0)[:, None, None, :, None]
        squares = queries[:, :, :, -self.window :].float().square().masked_fill(~real, 0.0)
        count = real.sum(3)
        energy = (squares.sum(3) / count.clamp(min=1)).mean(2, keepdim=True)  # (B,H,1,D)
        before = shared.get(QUERIES)
        return {**shared, QUERIES: energy if before is None else torch.where(count > 0, energy, before)}

    def learn(self, keys: Tensor, values: Tensor, valid: Tensor, shared: Fields) -> Fields:
        b, h, _, d = keys.shape
        held, asked = shared.get(CHANNELS), shared.get(QUERIES)
        held = torch.zeros(b, h, 1, d, dtype=torch.uint8, device=keys.device) if held is None else held
        asked = torch.zeros(b, h, 1, d, device=keys.device) if asked is None else asked
        squares = keys.float().square().masked_fill(~valid[..., None], 0.0).sum(2, keepdim=True)
        worth = torch.where((asked > 0).any(-1, keepdim=True), asked, torch.ones_like(asked)) * squares
        best = worth.nan_to_num(0.0).topk(self.kept(d), dim=-1).indices
        chosen = torch.zeros_like(held).scatter_(-1, best, 1)
        undecided = (held.sum(-1, keepdim=True) == 0) & valid.any(-1)[..., None, None]
        return {**shared, CHANNELS: torch.where(undecided, chosen, held), QUERIES: asked}

    def write(self, keys: Tensor, values: Tensor, valid: Tensor, shared: Fields) -> tuple[Fields, Fields]:
        at = self._places(shared[CHANNELS])
        return {"keys": keys.gather(-1, at.expand(*keys.shape[:3], -1)), "values": values}, shared

    def read(self, fields: Fields, shared: Fields) -> tuple[Tensor, Tensor]:
        kept = fields["keys"]
        mask = shared[CHANNELS][: len(kept)]
        whole = kept.new_zeros(*kept.shape[:3], mask.shape[-1])
        return whole.scatter_(-1, self._places(mask).expand(kept.shape), kept), fields["values"]

    def _places(self, mask: Tensor) -> Tensor:
        """Indices (B,H,1,K) of the channels of ``mask`` (B,H,1,D) in order; any K where none were chosen yet."""
        first = mask.sort(dim=-1, descending=True, stable=True).indices[..., : self.kept(mask.shape[-1])]
        return first.sort(dim=-1).values

    def check(self, fields: Fields, shared: Fields) -> None:
        mask = shared.get(CHANNELS)
        kept = None if mask is None else mask.sum(-1)
        if mask is None or kept is None or bool((mask > 1).any()):
            raise ValueError(f"{CHANNELS!r} says of no channel whether it is kept")
        if bool(((kept != 0) & (kept != self.kept(mask.shape[-1]))).any()):
            raise ValueError(f"{CHANNELS!r} keeps another number of channels than the codec does")
