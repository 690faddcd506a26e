"""Contexts by name: in memory as long as they are used, on the disk always."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from keepkv.engine.cache import Cache
from keepkv.errors import CacheFileError, ContextExists, ContextMissing, KeepKVError, TooLarge
from keepkv.plan.units import size
from keepkv.serve.batch.job import bytes_of
from keepkv.serve.contexts.files import Facts, Folder
from keepkv.serve.contexts.info import ContextInfo

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


@dataclass(frozen=True)
class _Context:
    """facts: None where they cannot be read. cache: None where it is on the disk only. used: when it last was."""

    facts: Facts | None
    cache: Cache | None = None
    used: int = 0
    problem: str | None = None
    disk: int = 0


class Shelf:
    """Contexts of an engine. Names and facts may be asked for by any thread; caches are the worker's.

    folder: None keeps all in memory. memory, disk: bytes that they may take of each; None: any.
    """

    def __init__(self, folder: Folder | None, memory: int | None, disk: int | None) -> None:
        self.folder, self.memory, self.disk = folder, memory, disk
        self._lock, self._clock = threading.RLock(), 0
        self._by: dict[str, _Context] = {}
        for found, problem in folder.read() if folder is not None else ():
            facts = found if isinstance(found, Facts) else None
            taken = folder.bytes(facts) if folder is not None and facts is not None else 0
            self._by[found if isinstance(found, str) else found.name] = _Context(facts, None, 0, problem, taken)

    # --- for any thread ----------------------------------------------------------------------------------------------

    def check_name(self, name: str, replace: bool) -> None:
        """Raise where ``name`` cannot be that of a new context."""
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise KeepKVError(f"name={name!r}: give letters, digits, - and _, 100 at most, beginning with no - or _")
        if not replace and name in self._by:
            raise ContextExists(f"there is a context {name!r}: delete it first, or ask for it to be replaced")

    def facts(self, name: str) -> Facts:
        """Raises ``ContextMissing`` where there is none of this name, or none that can be used."""
        with self._lock:
            found = self._found(name)
        if found.problem is not None or found.facts is None:
            raise ContextMissing(f"context {name!r} cannot be used: {found.problem}")
        return found.facts

    def info(self, name: str) -> ContextInfo:
        """Also of one that cannot be used. Raises ``ContextMissing``."""
        with self._lock:
            return _info(name, self._found(name))

    def infos(self) -> list[ContextInfo]:
        """Of all, by name."""
        with self._lock:
            return [_info(name, self._by[name]) for name in sorted(self._by)]

    def delete(self, name: str) -> None:
        """Raises ``ContextMissing``."""
        with self._lock:
            gone = self._found(name)
            del self._by[name]
            if self.folder is not None:
                self.folder.remove(name, gone.facts.file if gone.facts is not None else None)

    @property
    def held(self) -> tuple[int, int, int]:
        """How many are in memory, and bytes of memory and disk."""
        with self._lock:
            inside = [x for x in self._by.values() if x.cache is not None]
            return len(inside), sum(x.facts.bytes for x in inside if x.facts), sum(x.disk for x in self._by.values())

    # --- for the worker ----------------------------------------------------------------------------------------------

    def cache(self, name: str) -> Cache:
        """That of a context, read from its file where it is not in memory; not to be changed. Raises
        ``ContextMissing``."""
        facts = self.facts(name)
        with self._lock:
            known = self._by[name].cache
        if known is None:
            assert self.folder is not None
            try:
                known = self.folder.load(facts)
            except CacheFileError as error:
                self._note(name, facts, problem=str(error))
                raise ContextMissing(f"context {name!r} cannot be used: {error}") from error
        self._clock += 1
        self._note(name, facts, cache=known, used=self._clock)
        self.trim(keep=name)
        return known

    def put(
        self, name: str, cache: Cache, tokens: tuple[int, ...], text: str, receipt: Mapping[str, Any]
    ) -> ContextInfo:
        """A new context, in the place of one of this name; it is on the disk when this returns. Raises ``TooLarge``
        where memory or disk have no room for it."""
        receipt = dict(receipt)
        survival, taken = tuple(receipt.pop("survival")), bytes_of(cache)
        old = self._by.get(name)
        _, inside, on_disk = self.held
        self._check("disk", taken, on_disk - (old.disk if old else 0), self.disk)
        facts: dict[str, Any] = {
            "name": name, "tokens": tokens, "text": text, "created": time.time(), "bytes": taken,
            "full_bytes": receipt["full_bytes"], "method": receipt["method"], "budget": receipt["budget"],
            "receipt": receipt, "survival": survival,
        }  # fmt: skip
        if self.folder is None:
            self._check("memory", taken, inside - (old.facts.bytes if old and old.facts else 0), self.memory)
            made, disk = Facts(file="", model={}, **facts), 0
        else:
            made = self.folder.write(cache, **facts)
            disk = self.folder.bytes(made)
        self._clock += 1
        with self._lock:
            self._by[name] = _Context(made, cache, self._clock, None, disk)
        self.trim(keep=name)
        return self.info(name)

    def trim(self, keep: str | None = None, most: int | None = None) -> None:
        """Leave the caches of the least recently used to the disk, until those in memory take no more than they may, or
        than ``most`` bytes. keep: one that stays whatever it takes."""
        limit = min((x for x in (self.memory, most) if x is not None), default=None)
        if self.folder is None or limit is None:
            return
        with self._lock:
            oldest = sorted((x.used, name) for name, x in self._by.items() if x.cache is not None and name != keep)
            for _, name in oldest:
                if self.held[1] <= limit:
                    return
                self._by[name] = replace(self._by[name], cache=None)

    def _note(self, name: str, facts: Facts, **changes: Any) -> None:
        with self._lock:
            if name in self._by and self._by[name].facts is facts:  # else it was deleted or replaced meanwhile
                self._by[name] = replace(self._by[name], **changes)

    def _found(self, name: str) -> _Context:
        if name not in self._by:
            raise ContextMissing(
                f"there is no context {name!r}; known are {', '.join(sorted(self._by)[:20]) or 'none'}"
            )
        return self._by[name]

    @staticmethod
    def _check(where: str, taken: int, held: int, limit: int | None) -> None:
        if limit is not None and held + taken > limit:
            raise TooLarge(
                f"the context takes {size(taken)} of {where}, and {size(max(0, limit - held))} of {size(limit)} are "
                "left for contexts: delete others first",
                taken,
                max(0, limit - held),
            )


def _info(name: str, context: _Context) -> ContextInfo:
    facts = context.facts
    if facts is None:
        return ContextInfo(name, 0, 0, 0, "", 1.0, 0.0, False, {}, (), "", context.problem)
    return ContextInfo(
        name, len(facts.tokens), facts.bytes, facts.full_bytes, facts.method, facts.budget, facts.created,
        context.cache is not None, facts.receipt, facts.survival, facts.text, context.problem,
    )  # fmt: skip
