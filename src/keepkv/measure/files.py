"""Files of rows: JSON lines with everything, a table beside them, compressed or not."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from keepkv.errors import KeepKVError
from keepkv.measure.rows import R, Row, RowError


def folder(path: str) -> Path:
    """A directory to write to, made where it is missing. To be called before measuring: it raises ``KeepKVError``."""
    made = Path(path).expanduser()
    try:
        made.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KeepKVError(f"cannot write to {path!r}: {error.strerror}") from error
    return made


def write(rows: Sequence[Row], into: Path, name: str) -> list[Path]:
    """``into/name.jsonl`` with everything and ``into/name.csv`` with one column for each number."""
    lines, flat = into / f"{name}.jsonl", into / f"{name}.csv"
    try:
        lines.write_text("".join(json.dumps(row.to_dict()) + "\n" for row in rows), encoding="utf-8")
        with flat.open("w", newline="", encoding="utf-8") as file:
            tables = [row.flat() for row in rows]
            writer = csv.DictWriter(file, list(dict.fromkeys(column for table in tables for column in table)))
            writer.writeheader()
            writer.writerows(tables)
    except OSError as error:
        raise KeepKVError(f"cannot write to {str(into)!r}: {error.strerror}") from error
    return [lines, flat]


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
    lines = enumerate(text_of(path).split("\n"), 1)
    return [kind.from_line(line, f"{path.name}, line {number}") for number, line in lines if line.strip()]


def read_lines(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """The rows of all ``files`` of that name as plain data, unchecked."""
    for path in files(folder, name):
        yield from map(json.loads, text_of(path).splitlines())
