"""Rows of one layer that one call of a kernel serves, where rows decode side by side on a CPU.

Row by row, Python takes ten times as long as the arithmetic of a small model. What may be done together is what every
row does alike: a token is added to exact slots in a rectangle, attends over these and ragged ones, and nothing else
looks at it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from keepkv.attention.part import plain
from keepkv.engine.layer import Layer
from keepkv.engine.mask_rule import MaskRule
from keepkv.kernels.dispatch import by_cpp
from keepkv.kernels.native.decode import obstacle
from keepkv.kernels.native.rows import Older, Rows, fits
from keepkv.store.columns import Columns


class Together:
    """Of the rows of a batch, those whose token is added in one call; the others are left as they are.

    layers: of each row, the same layer of the model. keys (B,H,1,D), values (B,H,1,Dv): of the batch, which may have
    rows behind those of ``layers``. run: calls what it is given for a row, with the arguments behind it; None where
    that fails, or has before. at: the rows that it serves.
    """

    def __init__(self, layers: Sequence[Any], keys: Tensor, values: Tensor, run: Callable[..., Any]) -> None:
        self._rows = Rows()
        if by_cpp(None, lambda: obstacle(keys, keys, values)):
            for at, layer in enumerate(layers):
                if (room := run(at, _room, layer, keys, values)) is not None:
                    newest, older = room
                    self._rows.take(at, newest.fields, newest.length, layer.shared.positions.positions, older)
        if self._rows.at:
            self._rows.add(keys, values)
        for at in self._rows.at:
            run(at, layers[at].wrote)
        self.at = frozenset(self._rows.at)

    def attend(
        self, query: Tensor, rules: Sequence[MaskRule], *, scaling: float | None = None, softcap: float | None = None,
        s_aux: Tensor | None = None, dropout: float = 0.0, **kwargs: Any,
    ) -> Tensor | None:  # fmt: skip
        """(B,1,Hq,Dv) of ``query`` (B,Hq,1,D), 0 in the rows that it does not serve; None where it cannot, and each row
        must attend by itself."""
        plain = s_aux is None and not dropout and all(rules[at].plain_causal for at in self.at)
        if not self.at or not plain or not by_cpp(None, lambda: obstacle(query)):
            return None
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return self._rows.attend(query[:, :, 0], scaling, softcap).to(query.dtype)[:, None]


def _room(layer: Any, keys: Tensor, values: Tensor) -> tuple[Columns, Older | None] | None:
    """Where ``layer`` takes its next token, if that may be written from outside, and its older slots."""
    if type(layer) is not Layer or layer.__dict__.keys() & {"update", "attend"}:  # what somebody changed must run
        return None
    position = layer.shared.positions.positions
    if position is None or not position.is_cpu or not layer.unwatched or (room := layer.store.room()) is None:
        return None
    fields, older = room.newest.fields, None
    if room.older is not None:
        assert room.older.segments is not None
        older = Older(*plain(room.older), room.older.log_votes, room.older.segments)
    same = fields["keys"].dtype == keys.dtype and fields["values"].dtype == values.dtype
    return (room.newest, older) if same and fits(fields, older) else None
