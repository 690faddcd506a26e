"""Pieces from outside of the package: files that are imported by name, and installed packages that announce themselves.

A file is run once, and its ``register_…`` calls take effect. A package has an entry point in the group ``GROUP``, which
names a module, or a function in one that is then called; it is loaded when a name is asked for that is not known yet,
or when names are listed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from keepkv.errors import KeepKVError

GROUP = "keepkv.plugins"


@dataclass(frozen=True)
class Imported:
    """A file that was imported. digest: of its text, the first 16 digits of its SHA-256."""

    path: Path
    digest: str


_files: dict[Path, Imported] = {}
_loaded: set[tuple[str, str]] = set()


def load_file(path: str | Path) -> Imported:
    """Run the Python file at ``path``, unless it was run before. Raises ``KeepKVError`` naming the file and the line.

    Modules that lie beside it can be imported by it.
    """
    where = Path(path).expanduser().resolve()
    if where in _files:
        return _files[where]
    try:
        text = where.read_bytes()
    except OSError as error:
        raise KeepKVError(f"cannot import {str(path)!r}: {error.strerror}") from error
    name = f"imported.{where.stem}"
    spec = importlib.util.spec_from_file_location(name, where)
    if spec is None or spec.loader is None:
        raise KeepKVError(f"cannot import {str(path)!r}: it is no Python file, whose name ends in .py")
    if str(where.parent) not in sys.path:
        sys.path.append(str(where.parent))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception | SystemExit):
            raise
        said = error.msg if isinstance(error, SyntaxError) else error
        raise KeepKVError(f"{path}{_line(error, where)}: {type(error).__name__}: {said}") from error
    _files[where] = Imported(where, hashlib.sha256(text).hexdigest()[:16])
    return _files[where]


def imported() -> list[Imported]:
    """The files that were imported in this process, in order."""
    return list(_files.values())


def load_packages() -> None:
    """Load the entry points of installed packages that were not loaded before. One that cannot be loaded is named in a
    warning, and the others are."""
    for point in _points(tuple(sys.path)):
        if (point.name, point.value) not in _loaded:
            _loaded.add((point.name, point.value))  # before it is run: it may ask for names itself
            _load(point)


@lru_cache(maxsize=1)
def _points(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Those of the packages on ``path``, which is read once: it takes tens of milliseconds."""
    return tuple(entry_points(group=GROUP))


def _load(point: EntryPoint) -> None:
    try:
        found = point.load()
        if callable(found):
            found()
    except Exception as error:
        package = f" of {point.dist.name}" if point.dist is not None else ""
        warnings.warn(
            f"the plugin {point.name!r}{package} could not be loaded, so its names are unknown: {point.value}: "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )


def _line(error: BaseException, where: Path) -> str:
    """``, line 7``: the last line of the file ``where`` that was reached."""
    if isinstance(error, SyntaxError) and error.filename == str(where):
        return f", line {error.lineno}"
    lines = [one.lineno for one in traceback.extract_tb(error.__traceback__) if one.filename == str(where)]
    return f", line {lines[-1]}" if lines else ""
