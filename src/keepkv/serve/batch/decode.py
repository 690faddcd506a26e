"""One decoded token of several rows, in one forward; and in which widths rows do not feel each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keepkv.engine.cache import Cache
from keepkv.engine.side_by_side import SideBySide
from keepkv.engine.versions import CACHE
from keepkv.errors import KeepKVError

LEAST = 4  # rows of a matrix product below which libraries take another routine than for many


class Decoder:
    """Decodes rows side by side, in batches of a few widths: rows that are missing are padding.

    widths: those in which a row's logits are the same bits, whatever its place and its neighbours are, on this device
    and with this number of threads, found by trying them. (1,): there are none, as where experts are chosen by tokens,
    and rows are decoded one by one. exact: False takes every row at once, in as wide a batch as there are rows.
    """

    def __init__(self, model: Any, rows: int, exact: bool = True) -> None:
        self.model, self.rows = model, rows
        self.vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self.widths = self._tried() if exact else tuple(range(1, rows + 1))

    def step(self, caches: Sequence[Cache], tokens: Sequence[int]) -> list[Tensor | Exception]:
        """Of each row its logits (V,) behind ``tokens``, one for each cache, or what went wrong in it."""
        most, found = self.widths[-1], list[Tensor | Exception]()
        for start in range(0, len(caches), most):
            found += self._together(caches[start : start + most], tokens[start : start + most])
        return found

    def _together(self, caches: Sequence[Cache], tokens: Sequence[int]) -> list[Tensor | Exception]:
        width = next(w for w in self.widths if w >= len(caches))
        if width == 1:
            return [self._alone(caches[0], tokens[0])]
        batch = SideBySide(caches)
        try:
            logits = self._forward(batch, tokens, [cache.get_seq_length() for cache in caches], width)
        except Exception as error:  # not of one row: what each of them holds now is not known
            return [error] * len(caches)
        return [batch.failed.get(row, logits[row]) for row in range(len(caches))]

    def _alone(self, cache: Cache, token: int) -> Tensor | Exception:
        try:
            return self._forward(cache, [token], [cache.get_seq_length()], 1)[0]
        except Exception as error:
            return error

    def _forward(self, cache: Any, tokens: Sequence[int], places: Sequence[int], width: int) -> Tensor:
        empty = [0] * (width - len(tokens))
        ids, at = (torch.tensor([*x, *empty], device=self.model.device)[:, None] for x in (tokens, places))
        out = self.model(input_ids=ids, position_ids=at, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        logits: Tensor = out.logits[:, -1]
        return logits

    # --- which widths ------------------------------------------------------------------------------------------------

    def _tried(self) -> tuple[int, ...]:
        """Widths from ``LEAST`` on, each twice the one before, that give the bits of the widest."""
        if _depends_on_length(self.model):
            return (1,)
        widths = [LEAST]
        while widths[-1] < self.rows:
            widths.append(2 * widths[-1])
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocabulary, (widths[-1],), generator=draw).tolist()
        try:
            whole = self._fresh(tokens, widths[-1])
            around = self._fresh([*tokens[::-1]], widths[-1]).flip(0)  # other places, other neighbours
            few = self._fresh(tokens[:1], widths[-1])
        except KeepKVError:  # layers that cannot be told apart by rows
            return (1,)
        if not (torch.equal(whole, around) and torch.equal(whole[:1], few)):
            return (1,)
        return tuple(w for w in widths if torch.equal(self._fresh(tokens[:w], w), whole[:w]))

    def _fresh(self, tokens: Sequence[int], width: int) -> Tensor:
        """Logits (B,V) of ``tokens`` that stand alone in their rows, in a batch of ``width``."""
        batch = SideBySide([Cache(self.model, "full") for _ in tokens])
        with torch.inference_mode():
            logits = self._forward(batch, tokens, [0] * len(tokens), width)[: len(tokens)].clone()
        for error in batch.failed.values():
            raise error
        return logits


def _depends_on_length(model: Any) -> bool:
    """Whether the rotary embedding of every row depends on the longest one."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = {one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, dict)}
    return bool(kinds & {"dynamic", "longrope"})
