"""One more token in each of several rows that decode side by side on a CPU: one call for all rows."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import CDLL, c_int64
from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.kernels.native import library
from keepkv.kernels.native.decode import EXACT
from keepkv.kernels.segments import Segments


class Older(NamedTuple):
    """Slots of a row that lie ragged, none of them empty: keys (N,D) and values (N,Dv) in the dtypes of the others,
    log_votes (N,) float32 or None; ``where`` says whose they are."""

    keys: Tensor
    values: Tensor
    log_votes: Tensor | None
    where: Segments


def fits(fields: Mapping[str, Tensor], older: Older | None = None) -> bool:
    """Whether ``Rows`` takes a row whose slots are ``fields`` and ``older``: on a CPU, in a dtype of ``EXACT``,
    contiguous, and nothing else beside them. They are those of a store: keys (1,H,capacity,D), values
    (1,H,capacity,Dv), positions (1,H,capacity) int32, log_votes (1,H,capacity) float32 or none."""
    keys, values, votes = fields["keys"], fields["values"], fields.get("log_votes")
    if len(keys) != 1 or len(fields) != (3 if votes is None else 4) or fields["positions"].dtype != torch.int32:
        return False
    if keys.dtype not in EXACT or values.dtype not in EXACT or not _floats(votes):
        return False
    if not all(x.is_cpu and x.is_contiguous() for x in fields.values()):
        return False
    if older is None:
        return True
    same = older.keys.dtype == keys.dtype and older.values.dtype == values.dtype and _floats(older.log_votes)
    return same and all(x.is_contiguous() for x in (older.keys, older.values, older.log_votes) if x is not None)


class Rows:
    """Some rows of a batch. They stay where they are from ``add`` until ``attend``."""

    def __init__(self) -> None:
        self.at = list[int]()  # their numbers in the batch
        self._said, self._width = list[int](), 0

    def take(
        self, at: int, fields: Mapping[str, Tensor], used: int, position: Tensor, older: Older | None = None
    ) -> None:
        """Row number ``at``: of its ``fields``, as ``fits`` has them, the first ``used`` are slots. position: one
        int64, of the token that is added."""
        keys, values, positions, votes = fields["keys"], fields["values"], fields["positions"], fields.get("log_votes")
        (_, heads, capacity, width), self._width = keys.shape, values.shape[3]
        self._said += (
            keys.data_ptr(), values.data_ptr(), 0 if votes is None else votes.data_ptr(), positions.data_ptr(),
            position.data_ptr(), at, heads, capacity, used, width, self._width, EXACT[keys.dtype], EXACT[values.dtype],
        )  # fmt: skip
        self._said += _NONE if older is None else _said_of(older)
        self.at.append(at)

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Write the token of each row behind its slots: keys (B,H,1,D) and values (B,H,1,Dv) of the batch, in the
        dtypes of the slots."""
        self._rows = (c_int64 * len(self._said))(*self._said)  # as ``Row`` of decode.cpp; it counts what it adds
        keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (keys, values))
        strides = [x.stride(at) * x.element_size() for x in (keys, values) for at in (0, 1)]
        _library().keepkv_append(
            self._rows, len(self.at), keys.data_ptr(), *strides[:2], values.data_ptr(), *strides[2:]
        )

    def attend(self, query: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """Attention (B,Hq,Dv) float32 of ``query`` (B,Hq,D) over the slots of the rows; 0 in others of the batch.

        The sums of a row are the same whatever the other rows and the number of threads.
        """
        query = (query.float() * scaling).contiguous()
        output, lse = query.new_zeros(*query.shape[:2], self._width), query.new_empty(len(self.at), query.shape[1])
        _library().keepkv_decode_rows(
            self._rows, len(self.at), query.shape[1], query.data_ptr(), output.data_ptr(), lse.data_ptr(),
            torch.get_num_threads(), softcap or 0.0,
        )  # fmt: skip
        return output


_NONE = (0,) * 7


def _floats(votes: Tensor | None) -> bool:
    return votes is None or votes.dtype == torch.float32


def _said_of(older: Older) -> tuple[int, ...]:
    votes, (first, lengths) = older.log_votes, (older.where.first, older.where.lengths)
    assert first is not None and lengths is not None
    return (
        older.keys.data_ptr(), older.values.data_ptr(), 0 if votes is None else votes.data_ptr(), first.data_ptr(),
        lengths.data_ptr(), older.where.longest, len(older.keys),
    )  # fmt: skip


def _library() -> CDLL:
    built = library()
    assert isinstance(built, CDLL)
    return built
