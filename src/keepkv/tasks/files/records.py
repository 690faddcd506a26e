"""Records of JSON, JSON lines, parquet and tab-separated files, or from a hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keepkv.tasks.base import TaskError

Record = dict[str, Any]
Records = Sequence[Record]
FOLDER = "_folder"  # of a record: where its file lies
ENDINGS = (".jsonl", ".json", ".parquet", ".tsv")
_WIDEST = 2**31 - 1  # letters of a cell, which may be a picture


def read(path: str | Path, part: str = "") -> list[Record]:
    """The records of a file, of all files that a name with ``*`` matches, or of the file named after ``part`` in a
    directory. Raises ``TaskError``."""
    place = file_of(path, part)
    if "*" in place.name:
        if not (several := sorted(place.parent.glob(place.name))):
            raise TaskError(f"no file is named like {str(path)!r}")
        return [record for one in several for record in read(one, part)]
    if place.suffix not in ENDINGS:
        raise TaskError(f"cannot read {str(path)!r}: supported are {', '.join(ENDINGS)}")
    try:
        found = {".parquet": _parquet, ".tsv": _table}.get(place.suffix, _json)(place)
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
    if not found or not all(isinstance(record, dict) for record in found):
        raise TaskError(f"{str(path)!r} holds no list of records: JSON objects, one per line or in one list, are read")
    return found


def file_of(path: str | Path, part: str) -> Path:
    """The path of a file, or in a directory that of the one named after ``part``."""
    place = Path(path).expanduser()
    if not place.is_dir():
        return place
    held = [place / f"{part}{ending}" for ending in ENDINGS if part and (place / f"{part}{ending}").is_file()]
    if not held:
        wanted = " or ".join(f"{part or 'NAME'}{ending}" for ending in ENDINGS)
        raise TaskError(f"{str(path)!r} is a directory without {wanted}: give the path of the file")
    return held[0]


def download(name: str, configuration: str | None, split: str) -> list[Record]:
    """The records of a data set of the Hugging Face hub, or of its local cache."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as missing:
        raise TaskError(
            f"{name!r} comes from the hub through datasets, which is not installed: pip install 'keepkv[eval]', or "
            "give the path of a local file"
        ) from missing
    try:
        found = load_dataset(name, configuration, split=split)
    except Exception as error:  # the library raises what its many back ends raise
        raise TaskError(f"cannot load {name!r} from the hub ({error}): give the path of a local file") from error
    return [dict(record) for record in found]


def _json(place: Path) -> list[Any]:
    text = place.read_text(encoding="utf-8")
    try:
        whole = json.loads(text)
    except ValueError:
        return [_line(place, i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not isinstance(whole, dict):
        return whole if isinstance(whole, list) else [whole]
    if isinstance(whole.get("data"), list):  # beside a name and a version
        return list(whole["data"])
    return [*whole.values()] if whole and all(isinstance(x, dict) for x in whole.values()) else [whole]  # by their ids


def _table(place: Path) -> list[Any]:
    """Rows below a line of names, as texts."""
    limit = csv.field_size_limit(_WIDEST)
    try:
        with place.open(encoding="utf-8", newline="") as lines:
            rows = csv.DictReader(lines, dialect="excel-tab", strict=True)
            found = []
            for row in rows:
                if None in row or None in row.values():
                    raise TaskError(f"{str(place)!r}, line {rows.line_num}, has not as many cells as the first line")
                found.append(dict(row))
            return found
    except csv.Error as error:
        raise TaskError(f"{str(place)!r} is not a table with tabs between its cells: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _line(place: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise TaskError(f"{str(place)!r}, line {number}, is not JSON: {error}") from error


def _parquet(place: Path) -> list[Any]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import read_table
    except ModuleNotFoundError as missing:
        raise TaskError(
            f"{str(place)!r} needs pyarrow, which is not installed: pip install 'keepkv[eval]'"
        ) from missing
    try:
        return list(read_table(place).to_pylist())
    except ArrowInvalid as error:
        raise TaskError(f"{str(place)!r} is not a parquet file: {error}") from error
