"""The ledger: killed at any byte, it goes on as if it had not been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from keepkv.errors import KeepKVError
from keepkv.measure import Ledger, Row
from keepkv.measure.alone import LOCK, alone
from keepkv.measure.files import read_file, read_lines


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


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"x": "1"}', r'x is "1", expected int'),
        (b'{"x":', "not JSON"),
        (b"", "not JSON"),
        (b"\0" * 600, "not JSON"),
        (b'{"x": \xff}', "not UTF-8"),
        (b"[1]", "not an object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"y": 1}', "no x"),
    ],
)
def test_from_a_line_that_is_no_row_on_the_file_is_cut(tmp_path: Path, line: bytes, said: str) -> None:
    """And nothing is lost: what was cut lies beside. Before, each of these lines ended every later run."""
    ledger = Ledger(tmp_path / "a.jsonl", Point)
    rest = line + b'\n{"x": 3}\n'
    ledger.path.write_bytes(b'{"x": 1}\n' + rest + b'{"x":')
    with pytest.warns(UserWarning, match=rf"a\.jsonl, line 2: .*{said}.*; that line and the 1 after it count as not"):
        assert ledger.rows() == [Point(x=1)]
    ledger.keep(lambda row: True)  # has been told
    ledger.append([Point(x=2)])
    assert ledger.rows() == [Point(x=1), Point(x=2)]
    assert (tmp_path / "a.jsonl.cut").read_bytes() == rest


def test_any_text_is_one_line(tmp_path: Path) -> None:
    """Lines end in "\\n" and nowhere else, also in files written when separators stood in them as they are."""
    texts = ["a\u2028b", "a\u2029b", "a\x85b", "a\x0bb\x0cc\x1cd\x1de\x1ef", "a\r\nb\rc", "\ud800", "\0", "😀"]
    rows = [Point(x=i, what=text) for i, text in enumerate(texts)]
    ledger = Ledger(tmp_path / "a.jsonl", Point)
    ledger.append(rows)
    assert ledger.rows() == rows == read_file(ledger.path, Point)
    assert len(ledger.path.read_text("ascii").splitlines()) == len(rows)
    raw = [{"x": row.x, "what": row.what} for row in rows if row.what != "\ud800"]
    ledger.path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in raw).encode())
    assert [row.what for row in ledger.rows()] == [row["what"] for row in raw] == [
        row["what"] for row in read_lines(tmp_path, "a.jsonl")
    ]  # fmt: skip


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with alone(tmp_path):
        with (
            pytest.raises(KeepKVError, match=rf"{LOCK}' is locked: .*\({os.getpid()}\).*Wait until.*--out"),
            alone(tmp_path),
        ):
            pass
    assert not list(tmp_path.iterdir())
    code = f"""
import fcntl, os, time
file = open({str(tmp_path / LOCK)!r}, "w")
fcntl.flock(file, fcntl.LOCK_EX)
print(os.getpid(), file=file, flush=True)
print(1, flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    with pytest.raises(KeepKVError, match=str(process.pid)), alone(tmp_path):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with alone(tmp_path):  # whatever its holder left
        assert (tmp_path / LOCK).exists()
    with pytest.raises(KeepKVError, match="cannot write"), alone(tmp_path / "nowhere"):
        pass


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeepKVError, match=r"cannot write to .*nowhere"):
        Ledger(tmp_path / "nowhere" / "a.jsonl", Point).append([Point(x=1)])
