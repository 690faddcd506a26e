"""Files of rows: JSON lines with everything, a table beside them, compressed or not."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from keepkv.errors import KeepKVError
from keepkv.measure.ledger import replace_text
from keepkv.measure.rows import R, Row, RowError, object_of

T = TypeVar("T")


def folder(path: str | Path) -> Path:
    """A directory to write to, made where it is missing. To be called before measuring: it raises ``KeepKVError``."""
    made = Path(path).expanduser()
    try:
        made.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KeepKVError(f"cannot write to {str(path)!r}: {error.strerror}") from error
    return made


def write(rows: Sequence[Row], into: Path, name: str) -> list[Path]:
    """``into/name.jsonl`` with everything and ``into/name.csv`` with one column for each number."""
    lines, flat = into / f"{name}.jsonl", into / f"{name}.csv"
    replace_text(lines, "".join(json.dumps(row.to_dict()) + "\n" for row in rows))
    write_table(rows, flat)
    return [lines, flat]


def write_table(rows: Sequence[Row], path: Path) -> None:
    """A CSV with one column for each number of ``rows``."""
    text = io.StringIO(newline="")
    tables = [row.flat() for row in rows]
    writer = csv.DictWriter(text, list(dict.fromkeys(column for table in tables for column in table)))
    writer.writeheader()
    writer.writerows(tables)
    replace_text(path, text.getvalue())


def files(folder: Path, name: str) -> list[Path]:
    """``items.jsonl`` and what peers add beside it (``items-kvpress.jsonl``), each as it is or compressed (``.gz``)."""
    stem, _, suffix = name.rpartition(".")
    names = [folder / name, *folder.glob(f"{stem}-*.{suffix}")]
    packed = [folder / f"{name}.gz", *folder.glob(f"{stem}-*.{suffix}.gz")]
    found = [path for path in names if path.is_file()]
    return sorted(found + [path for path in packed if path.is_file() and path.with_suffix("") not in found])


def text_of(path: Path) -> str:
    """The text of a file that may be compressed. Raises ``RowError`` where it cannot be read."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise RowError(f"cannot read {str(path)!r} as UTF-8 text: {error}") from error


def read_rows(folder: Path, name: str, kind: type[R]) -> list[R]:
    """The rows of all ``files`` of that name. Raises ``RowError``."""
    return [row for path in files(folder, name) for row in read_file(path, kind)]


def read_file(path: Path, kind: type[R]) -> list[R]:
    """A row for each line of ``path`` that is not empty. Raises ``RowError``."""
    return _each(path, kind.from_line)


def read_lines(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """The rows of all ``files`` of that name as plain data: objects, and otherwise unchecked. Raises ``RowError``."""
    for path in files(folder, name):
        yield from _each(path, object_of)


def _each(path: Path, made: Callable[[str, str], T]) -> list[T]:
    """What ``made`` makes of each line that is not empty and of where it stands. Lines end where JSON lines end: other
    separators, which a reply may hold, are text."""
    lines = enumerate(text_of(path).split("\n"), 1)
    try:
        return [made(line, f"{path.name}, line {number}") for number, line in lines if line.strip()]
    except RowError as error:
        raise RowError(
            f"{error}. A run that was cut off leaves a broken line: let it finish (the same command again), or delete "
            f"that line of {str(path)!r}."
        ) from error
