"""Names for pieces: one small registry, used for scores, allocations, reductions, stores and methods.

A name that is not known, and a list of names, bring in what installed packages register (``core.plugins``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from keepkv.core.options import arguments, shown
from keepkv.core.plugins import load_packages
from keepkv.errors import NameTaken, UnknownName

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


def owner(made: object) -> str:
    """Where a class or function is defined: ``module.name``, the same when it is defined there again."""
    named = made if hasattr(made, "__qualname__") else type(made)
    return f"{named.__module__}.{named.__qualname__}"


class Registry(Generic[T]):
    """Maps a name to a factory (class or function) that builds a piece from keyword options."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._factories: dict[str, Callable[..., T]] = {}

    def register(self, name: str, *, replace: bool = False) -> Callable[[F], F]:
        """Decorator that enters a factory under ``name``.

        What is defined again, as when a cell of a notebook is run twice, takes the place of its former self. The name
        of another one raises ``NameTaken`` unless ``replace`` is set.
        """

        def enter(factory: F) -> F:
            held = self._factories.get(name)
            if held is not None and not replace and owner(held) != owner(factory):
                raise NameTaken(
                    f"{self.kind} {name!r} is registered already, by {owner(held)}: give {owner(factory)} another "
                    "name, or register it with replace=True to take the place of the first"
                )
            self._factories[name] = factory
            return factory

        return enter

    def named(self, name: str) -> str:
        """``name`` as it is registered, which may differ in case; raises ``UnknownName`` with the nearest match."""
        return name if name in self else known_as(name, self, self.kind)

    def factory(self, name: str) -> Callable[..., T]:
        """The factory of ``name``; raises ``UnknownName`` with the nearest match."""
        return self._factories[self.named(name)]

    def name_of(self, made: object) -> str | None:
        """The name under which the definition of ``made``, a class or a function, is registered; None for none."""
        return next((name for name, factory in self._factories.items() if owner(factory) == owner(made)), None)

    def build(self, name: str, /, *given: Any, **options: Any) -> T:
        """Build the piece ``name`` with ``options``, and with what it must be ``given``; ``KeepKVError`` names the
        options that it has where these do not fit."""
        factory = self.factory(name)
        bound = arguments(f"{self.kind} {name!r}", factory, *given, **options)
        return factory(*bound.args, **bound.kwargs)

    def __iter__(self) -> Iterator[str]:
        load_packages()
        return iter(sorted(self._factories))

    def __contains__(self, name: object) -> bool:
        if isinstance(name, str) and name not in self._factories:
            load_packages()
        return isinstance(name, str) and name in self._factories
