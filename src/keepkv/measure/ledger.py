"""The file that rows are written to while a measurement runs, which may be killed at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic

from keepkv.errors import KeepKVError
from keepkv.measure.rows import R


class Ledger(Generic[R]):
    """Rows of one type, each a line of JSON: appended, never changed. kind: their type.

    Killed at any byte, the file ends in a line without an end. That line is no row: it is not read, and the next rows
    are written in its place.
    """

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.path, self.kind = path, kind

    def rows(self) -> list[R]:
        """All of them, in order; none where there is no file. Raises ``RowError`` for a line that is not a row."""
        return [row for _, row in self._read()]

    def append(self, rows: Iterable[R]) -> None:
        """Add ``rows``; they are on the disk when this returns. Raises ``KeepKVError`` where they cannot be written."""
        text = "".join(json.dumps(row.to_dict(), ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
        try:
            whole = len(_whole(self.path))
            with self.path.open("ab") as file:
                file.truncate(whole)
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise KeepKVError(f"cannot write to {str(self.path)!r}: {error.strerror}") from error

    def keep(self, wanted: Callable[[R], bool]) -> None:
        """Leave the rows that are ``wanted``, as they stand, and take out the others."""
        if self.path.exists():
            replace_text(self.path, "".join(line for line, row in self._read() if wanted(row)))

    def _read(self) -> Iterator[tuple[str, R]]:
        lines = _whole(self.path).decode("utf-8").split("\n")[:-1]
        for number, line in enumerate(lines, 1):
            yield line + "\n", self.kind.from_line(line, f"{self.path.name}, line {number}")


def replace_text(path: Path, text: str) -> None:
    """Make ``text`` what the file holds: all of it or the old text, whatever happens."""
    draft = path.with_suffix(".draft")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _whole(path: Path) -> bytes:
    """The bytes of a file up to its last line end: what a kill left unfinished is behind it."""
    if not path.exists():
        return b""
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]
