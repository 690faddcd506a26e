"""Rows that decode side by side by one call of the library: against float64, and each as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_slots import DEVICE, wide
from torch import Tensor

from keepkv import kernels
from keepkv.kernels import native
from keepkv.kernels.native.rows import Older, Rows, fits
from keepkv.kernels.segments import Segments

pytestmark = [
    pytest.mark.skipif(isinstance(native.library(), str), reason=f"no kernels in C++: {native.library()}"),
    pytest.mark.skipif(DEVICE.type != "cpu", reason="the slots are on a GPU"),
]
HEADS, WIDTH, OUT = 2, 24, 16


class Case:
    """Rows of ``lengths`` used slots with room for more, the tokens of a batch of ``batch``, and where the rows are."""

    def __init__(
        self, lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float32, votes: bool = True,
        older: bool = True,
    ) -> None:  # fmt: skip
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw)

        self.lengths, self.batch = lengths, len(lengths) + 2
        self.at = torch.randperm(self.batch, generator=draw)[: len(lengths)].tolist()
        self.fields: list[dict[str, Tensor]] = []
        self.older: list[Older | None] = []
        for n in lengths:
            capacity = n + 1 + int(torch.randint(4, (), generator=draw))
            positions = torch.arange(capacity, dtype=torch.int32).expand(1, HEADS, -1).clone()
            positions[torch.rand(positions.shape, generator=draw) < 0.2] = -1
            keys, values = normal(1, HEADS, capacity, WIDTH).to(dtype), normal(1, HEADS, capacity, OUT).to(dtype)
            fields = {"keys": keys, "values": values, "positions": positions}
            if votes:
                fields["log_votes"] = normal(1, HEADS, capacity).abs()
            self.fields.append(fields)
            lengths_ = torch.randint(0, 90, (1, HEADS), generator=draw)
            total, first = int(lengths_.sum()), lengths_.cumsum(-1) - lengths_
            where = Segments(1, HEADS, int(lengths_.max()), total, True, first, lengths_)
            old = Older(
                normal(total, WIDTH).to(dtype), normal(total, OUT).to(dtype), normal(total) if votes else None, where
            )
            self.older.append(old if older and total else None)
        self.keys = normal(self.batch, 1, HEADS, WIDTH).to(dtype).transpose(1, 2)  # as projections leave them
        self.values = normal(self.batch, HEADS, 1, OUT).to(dtype)
        self.query = normal(self.batch, 2 * HEADS, WIDTH).to(dtype)
        self.positions = [torch.tensor([[n + 7]]) for n in lengths]

    def copied(self) -> list[dict[str, Tensor]]:
        return [{name: x.clone() for name, x in fields.items()} for fields in self.fields]

    def run(self, which: list[int] | None = None, softcap: float | None = None) -> Tensor:
        rows = Rows()
        for i in range(len(self.lengths)) if which is None else which:
            assert fits(self.fields[i], self.older[i])
            rows.take(self.at[i], self.fields[i], self.lengths[i], self.positions[i], self.older[i])
        rows.add(self.keys, self.values)
        return rows.attend(self.query, 0.3, softcap)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    votes=st.booleans(),
    older=st.booleans(),
    softcap=st.sampled_from([None, 5.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_a_token_is_written_behind_each_row_and_attends(
    lengths: list[int], seed: int, votes: bool, older: bool, softcap: float | None, dtype: torch.dtype
) -> None:
    case = Case(lengths, seed, dtype, votes, older)
    before = case.copied()
    found = case.run(softcap=softcap)
    for i, (n, at) in enumerate(zip(lengths, case.at, strict=True)):
        told, held = before[i], case.fields[i]
        token = {"keys": case.keys[at], "values": case.values[at]}
        for name, x in held.items():
            assert torch.equal(x[:, :, :n], told[name][:, :, :n]) and torch.equal(
                x[:, :, n + 1 :], told[name][:, :, n + 1 :]
            )
            new = token.get(name, torch.tensor(n + 7 if name == "positions" else 0))
            assert torch.equal(x[0, :, n : n + 1], new.to(x.dtype).expand_as(x[0, :, n : n + 1]))
        slots: dict[str, Any] = {"log_votes": None, **{name: wide(x[:, :, : n + 1]) for name, x in held.items()}}
        if (old := case.older[i]) is not None:
            slots = {name: _behind(old, name, x) for name, x in slots.items()}
        exact = kernels.decode_attention(
            case.query[at : at + 1].double(), **slots, scaling=0.3, softcap=softcap, backend="reference"
        )
        torch.testing.assert_close(found[at : at + 1].double(), exact.output, rtol=1e-5, atol=2e-6)  # sums in float32
    others = sorted(set(range(case.batch)) - set(case.at))
    assert not found[others].any()


def _behind(old: Older, name: str, newer: Tensor | None) -> Tensor | None:
    """A field of the older slots as a rectangle, empty where a head has fewer, and the newer ones behind it."""
    if newer is None:
        return None
    index, inside = old.where.index()
    assert index is not None and inside is not None
    if name == "positions":
        return torch.cat((inside.to(newer.dtype) - 1, newer), 2)
    flat = getattr(old, name)
    return torch.cat((flat[index].to(newer.dtype), newer), 2)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_is_the_same_bits_whatever_the_others_are(threads: int) -> None:
    lengths, before = [4000, 37, 5000, 2], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = Case(lengths)
        found = together.run()
        for i, at in enumerate(together.at):
            alone = Case(lengths)
            assert torch.equal(alone.run([i])[at], found[at])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(Case(lengths).run(), found, rtol=0, atol=0)  # by as many threads as there are here


def test_what_does_not_fit_is_said() -> None:
    fields = Case([5]).fields[0]
    assert fits(fields) and fits({name: x for name, x in fields.items() if name != "log_votes"})
    two = {name: x.expand(2, *x.shape[1:]).contiguous() for name, x in fields.items()}
    strided = {**fields, "keys": fields["keys"].transpose(1, 2).contiguous().transpose(1, 2)}
    wrong = [two, strided, {**fields, "mass": fields["log_votes"]}, {**fields, "keys": fields["keys"].double()}]
    wrong += [{**fields, "log_votes": fields["log_votes"].to(x)} for x in (torch.bfloat16, torch.float64)]
    wrong += [{**fields, "positions": fields["positions"].long()}]
    assert not any(map(fits, wrong))
    older = next(x for x in Case([5] * 9).older if x is not None)
    assert older.log_votes is not None and fits(fields, older)
    assert not fits(fields, older._replace(log_votes=older.log_votes.bfloat16()))
    assert not fits(fields, older._replace(keys=older.keys.half()))
