"""Packages whose public names are imported when they are first asked for, and not with the package."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def lazily(package: str, modules: Mapping[str, str]) -> None:
    """Give ``package``, which is being imported, the public names of ``modules``: name to the module below it that has
    it, such as ``{"Cache": "engine.cache"}``."""
    made = sys.modules[package]
    made.__dict__["_modules"] = modules
    made.__class__ = _Package


class _Package(ModuleType):
    """A public name is what it says, even where a room is called the same: ``keepkv.methods`` is the function."""

    _modules: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        if name in self._modules:
            value = getattr(import_module(f"{self.__name__}.{self._modules[name]}"), name)
            self.__dict__[name] = value
            return value
        if not name.startswith("_") and find_spec(f"{self.__name__}.{name}"):
            return import_module(f"{self.__name__}.{name}")  # a room, such as keepkv.errors
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._modules or not isinstance(value, ModuleType):  # the import of a room sets it here
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *getattr(self, "__all__", ())})
