"""The ledger: killed at any byte, it goes on as if it had not been."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from keepkv.errors import KeepKVError
from keepkv.measure import Ledger, Row, RowError


@dataclass(frozen=True, kw_only=True)
class Point(Row):
    """One measurement."""

    x: int
    what: str = "é"


def test_cut_at_any_byte_it_goes_on_with_the_first_row_that_is_lost(tmp_path: Path) -> None:
    rows = [Point(x=i) for i in range(4)]
    whole = Ledger(tmp_path / "whole.jsonl", Point)
    whole.append(rows)
    data = whole.path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for size in range(len(data) + 1):
        ledger = Ledger(tmp_path / f"{size}.jsonl", Point)
        ledger.path.write_bytes(data[:size])
        held = ledger.rows()
        assert held == rows[: sum(end <= size for end in ends)]
        ledger.append(rows[len(held) :])
        assert ledger.path.read_bytes() == data and ledger.rows() == rows


def test_rows_are_taken_out_and_the_others_stay_as_they_stand(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.jsonl", Point)
    ledger.keep(lambda row: False)  # no file yet
    assert ledger.rows() == [] and not ledger.path.exists()
    ledger.path.write_text('{"x": 1}\n{"x":2, "other": 3}\n{"x":', encoding="utf-8")
    ledger.keep(lambda row: row.x == 2)
    assert ledger.path.read_text("utf-8") == '{"x":2, "other": 3}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_line_that_is_no_row_is_an_error(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.jsonl", Point)
    ledger.path.write_text('{"x": 1}\n{"x": "1"}\n', encoding="utf-8")
    with pytest.raises(RowError, match=r"a\.jsonl, line 2: x is \"1\", expected int"):
        ledger.rows()


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeepKVError, match=r"cannot write to .*nowhere"):
        Ledger(tmp_path / "nowhere" / "a.jsonl", Point).append([Point(x=1)])
