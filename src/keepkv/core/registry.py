"""Names for pieces: one small registry, used for scores, allocations, reductions, stores and methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from keepkv.core.options import arguments, shown
from keepkv.errors import UnknownName

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def known_as(name: str, known: Iterable[str], kind: str) -> str:
    """``name`` as it is written in ``known``: the same, or else the only one that differs in nothing but case.

    Raises ``UnknownName``, which names the nearest one; kind: what it is a name of.
    """
    names = list(known)
    if name in names:
        return name
    alike = [one for one in names if isinstance(name, str) and one.casefold() == name.casefold()]
    if len(alike) != 1:
        raise UnknownName(kind, name if isinstance(name, str) else shown(name), names)
    return alike[0]


class Registry(Generic[T]):
    """Maps a name to a factory (class or function) that builds a piece from keyword options."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._factories: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator that enters a factory under ``name``; a name can be taken only once."""

        def enter(factory: F) -> F:
            if name in self._factories:
                raise ValueError(f"{self.kind} {name!r} is registered already, by {self._factories[name]!r}")
            self._factories[name] = factory
            return factory

        return enter

    def named(self, name: str) -> str:
        """``name`` as it is registered, which may differ in case; raises ``UnknownName`` with the nearest match."""
        return known_as(name, self._factories, self.kind)

    def factory(self, name: str) -> Callable[..., T]:
        """The factory of ``name``; raises ``UnknownName`` with the nearest match."""
        return self._factories[self.named(name)]

    def build(self, name: str, /, *given: Any, **options: Any) -> T:
        """Build the piece ``name`` with ``options``, and with what it must be ``given``; ``KeepKVError`` names the
        options that it has where these do not fit."""
        factory = self.factory(name)
        bound = arguments(f"{self.kind} {name!r}", factory, *given, **options)
        return factory(*bound.args, **bound.kwargs)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._factories))

    def __contains__(self, name: object) -> bool:
        return name in self._factories
