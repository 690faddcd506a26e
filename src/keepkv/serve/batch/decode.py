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
from keepkv.serve.batch.sampling import Likeliest, likeliest
from keepkv.serve.batch.threads import fastest, threads_of

LEAST = 4  # rows of a matrix product below which libraries take another routine than for many
Behind = tuple[Tensor, Likeliest]  # the logits (V,) behind a row's token, and the likeliest of them


class Decoder:
    """Decodes rows side by side, in batches of a few widths: rows that are missing are padding.

    widths: those in which a row's logits are the same bits, whatever its place and its neighbours are, on this device
    and with this number of threads, found by trying them. (1,): there are none, as where experts are chosen by tokens,
    and rows are decoded one by one. exact: False takes every row at once, in as wide a batch as there are rows.
    threads: of a CPU, that decode; where none are asked for, those with which a step of all rows is fastest, found by
    trying them. None on other devices.
    """

    def __init__(self, model: Any, rows: int, exact: bool = True, threads: int | None = None) -> None:
        self.model, self.rows = model, rows
        self.threads = (threads or self._fastest()) if model.device.type == "cpu" else None
        self.vocabulary = model.config.get_text_config(decoder=True).vocab_size
        with threads_of(self.threads):  # the bits of a product may hang on them
            self.widths = self._tried() if exact else tuple(range(1, rows + 1))

    def step(self, caches: Sequence[Cache], tokens: Sequence[int]) -> list[Behind | Exception]:
        """Of each row what stands behind ``tokens``, one for each cache, or what went wrong in it."""
        most, found = self.widths[-1], list[Behind | Exception]()
        with threads_of(self.threads):
            for start in range(0, len(caches), most):
                found += self._together(caches[start : start + most], tokens[start : start + most])
        return found

    def _together(self, caches: Sequence[Cache], tokens: Sequence[int]) -> list[Behind | Exception]:
        width = next(w for w in self.widths if w >= len(caches))
        if width == 1:
            return [self._alone(caches[0], tokens[0])]
        batch = SideBySide(caches)
        try:
            logits = self._forward(batch, tokens, [cache.get_seq_length() for cache in caches], width)
        except Exception as error:  # not of one row: what each of them holds now is not known
            return [error] * len(caches)
        every = zip(logits, likeliest(logits), strict=True)
        return [batch.failed.get(row, behind) for row, behind in zip(range(len(caches)), every, strict=False)]

    def _alone(self, cache: Cache, token: int) -> Behind | Exception:
        try:
            logits = self._forward(cache, [token], [cache.get_seq_length()], 1)
        except Exception as error:
            return error
        return logits[0], likeliest(logits)[0]

    def _forward(self, cache: Any, tokens: Sequence[int], places: Sequence[int], width: int) -> Tensor:
        empty = [0] * (width - len(tokens))
        ids, at = torch.tensor([[*tokens, *empty], [*places, *empty]], device=self.model.device)[..., None]
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

    def _fastest(self) -> int:
        """Threads with which as many rows decode fastest as decode together here."""
        rows = 1 if _depends_on_length(self.model) else self.rows
        caches, tokens = [Cache(self.model, "full") for _ in range(rows)], [0] * rows

        def together() -> None:
            self._forward(SideBySide(caches), tokens, [caches[0].get_seq_length()] * rows, rows)

        def alone() -> None:
            self._forward(caches[0], [0], [caches[0].get_seq_length()], 1)

        with torch.inference_mode():
            try:
                return fastest(together)
            except KeepKVError:  # layers that cannot be told apart by rows
                return fastest(alone)

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
