"""Contexts on disk: a cache file as ``Cache.save`` writes it, and a small file beside it that makes it count.

``NAME.json`` is written last and names its cache file: what has no such file was never acknowledged, and is removed
when the folder is opened. A folder belongs to one process at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from keepkv.core import wholefile
from keepkv.engine.cache import Cache
from keepkv.engine.files import origin
from keepkv.engine.fingerprint import shape
from keepkv.errors import CacheFileError, KeepKVError
from keepkv.measure.alone import alone

FORMAT = "keepkv.context/1"
_FACTS, _CACHE = ".json", ".cache.safetensors"


@dataclass(frozen=True)
class Facts:
    """What the small file says. file: name of the cache file. model: of which the cache is, as cache files say it."""

    name: str
    tokens: tuple[int, ...]
    text: str
    created: float
    bytes: int
    full_bytes: int
    method: str
    budget: float | int | str
    receipt: dict[str, Any]
    survival: tuple[float, ...]
    file: str
    model: dict[str, Any]


class Folder:
    """Contexts of one folder, which is made where there is none. Raises ``KeepKVError`` where it cannot be used, or
    another process has it."""

    def __init__(self, path: Path, model: Any) -> None:
        self.path, self.model = path, model
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KeepKVError(f"cannot use {str(path)!r} for contexts: {wholefile.reason(error)}") from error
        self._alone = ExitStack()
        self._alone.enter_context(alone(path, "Give each server a folder of contexts of its own."))
        self.facts = origin.facts(model)

    def close(self) -> None:
        """Let another process have the folder."""
        self._alone.close()

    def read(self) -> Iterator[tuple[Facts | str, str | None]]:
        """What is there: facts, or the name alone where they cannot be read, and what is wrong; None: nothing. Cache
        files that no facts name are removed."""
        named, unread = set(), set()
        for path in sorted(self.path.glob(f"*{_FACTS}")):
            try:
                facts = self._facts(path)
            except (ValueError, TypeError, KeyError, OSError) as error:
                unread.add(path.name.removesuffix(_FACTS))
                yield path.name.removesuffix(_FACTS), f"{path}: not the facts of a context: {error}"
                continue
            named.add(facts.file)
            yield facts, self._problem(facts)
        for path in self.path.glob(f"*{_CACHE}"):
            if path.name not in named and _name_in(path) not in unread:  # whose facts may name it
                path.unlink()

    def write(self, cache: Cache, **facts: Any) -> Facts:
        """Put a context on the disk, for good."""
        made = Facts(file=f"{facts['name']}.{token_hex(4)}{_CACHE}", model=self._model(), **facts)
        path = self.path / made.file
        try:
            cache.save(path)
            text = json.dumps({"format": FORMAT, **asdict(made)})
            wholefile.replace(self.path / f"{made.name}{_FACTS}", lambda file: file.write(text.encode()))
        except (KeepKVError, OSError) as error:
            path.unlink(missing_ok=True)
            if isinstance(error, KeepKVError):
                raise
            raise CacheFileError(f"cannot write context {made.name!r}: {wholefile.reason(error)}") from error
        for old in self.path.glob(f"{made.name}.*{_CACHE}"):
            if old != path and _name_in(old) == made.name:
                old.unlink()
        return made

    def load(self, facts: Facts) -> Cache:
        """The cache. Raises ``CacheFileError`` where its file is of another model, or damaged."""
        return Cache.load(self.path / facts.file, self.model)

    def remove(self, name: str, file: str | None) -> None:
        """Take a context from the disk: its facts first, without which its cache does not count."""
        (self.path / f"{name}{_FACTS}").unlink(missing_ok=True)
        wholefile.keep_name(self.path)
        if file is not None:
            (self.path / file).unlink(missing_ok=True)

    def bytes(self, facts: Facts) -> int:
        """Of the cache file."""
        try:
            return (self.path / facts.file).stat().st_size
        except FileNotFoundError:
            return 0

    def _facts(self, path: Path) -> Facts:
        with wholefile.open_regular(path) as file:
            found = json.load(file)
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        found |= {name: tuple(found[name]) for name in ("tokens", "survival")}
        facts = Facts(**found)
        if facts.name + _FACTS != path.name or Path(facts.file).name != facts.file:
            raise ValueError(f"it is of context {facts.name!r}")
        return facts

    def _model(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps({"shape": shape(self.model), "facts": self.facts}, default=str))
        return plain

    def _problem(self, facts: Facts) -> str | None:
        if not (self.path / facts.file).is_file():
            return f"its cache file {facts.file} is missing"
        mine = self._model()
        found = origin.compare((facts.model["shape"], mine["shape"]), (facts.model["facts"], mine["facts"]))
        if not (found.sizes or found.meaning):
            return None
        return f"made with another model; (then, now) differ in {found.sizes | found.meaning}"


def _name_in(path: Path) -> str:
    """Name of the context that a cache file is of."""
    return path.name.rsplit(".", 3)[0]
