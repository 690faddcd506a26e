"""The file that rows are written to while a measurement runs, which may be killed at any moment."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic

from keepkv.core import wholefile
from keepkv.errors import KeepKVError
from keepkv.measure.rows import R, RowError


class Ledger(Generic[R]):
    """Rows of one type, each a line of JSON: appended, never changed. kind: their type. One process writes at a time:
    ``alone`` sees to that.

    Killed at any byte, the file ends in a line without an end. That line is no row: it is not read, and the next rows
    are written in its place. A line that is no row for another reason (a disk that failed, a hand that slipped) is not
    read either, nor what follows it: a warning says so once, and ``keep`` moves them to ``NAME.cut``.
    """

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.path, self.kind = path, kind
        self._told = False

    def rows(self) -> list[R]:
        """All of them, in order, up to a line that is not a row; none where there is no file."""
        return [row for _, row in self._read()]

    def append(self, rows: Iterable[R]) -> None:
        """Add ``rows``; they are on the disk when this returns. Raises ``KeepKVError`` where they cannot be written."""
        text = "".join(json.dumps(row.to_dict(), separators=(",", ":")) + "\n" for row in rows)
        try:
            whole = len(_whole(self.path))
            with self.path.open("ab") as file:
                file.truncate(whole)
                file.write(text.encode("ascii"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def keep(self, wanted: Callable[[R], bool]) -> None:
        """Leave the rows that are ``wanted``, as they stand, and take out the others."""
        if not self.path.exists():
            return
        held = list(self._read())
        rest = _whole(self.path)[sum(len(line) for line, _ in held) :]
        if rest:
            replace_bytes(self.path.with_name(f"{self.path.name}.cut"), rest)
        replace_bytes(self.path, b"".join(line for line, row in held if wanted(row)))

    def _read(self) -> Iterator[tuple[bytes, R]]:
        lines = _whole(self.path).split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            where = f"{self.path.name}, line {number}"
            try:
                row = self.kind.from_line(decoded(line, where), where)
            except RowError as error:
                if not self._told:
                    more = len(lines) - number
                    warnings.warn(f"{error}; that line and the {more} after it count as not written", stacklevel=3)
                self._told = True
                return
            yield line + b"\n", row


def decoded(line: bytes, where: str) -> str:
    """The text of a line. Raises ``RowError`` where it is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def replace_text(path: Path, text: str) -> None:
    """Make ``text`` what the file holds: all of it or the old text, whatever happens. Raises ``KeepKVError``."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, data: bytes) -> None:
    """``replace_text`` of bytes."""
    try:
        wholefile.replace(path, lambda file: file.write(data))
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> KeepKVError:
    return KeepKVError(f"cannot write to {str(path)!r}: {wholefile.reason(error)}")


def _whole(path: Path) -> bytes:
    """The bytes of a file up to its last line end: what a kill left unfinished is behind it."""
    if not path.exists():
        return b""
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]
