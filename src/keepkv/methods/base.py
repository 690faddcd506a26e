"""A method: a named choice of score, allocation, reduction, store and schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from keepkv.allocate.base import Allocate
from keepkv.allocate.uniform import Uniform
from keepkv.core.registry import Registry
from keepkv.core.when import When
from keepkv.reduce.base import Reduce
from keepkv.reduce.drop import Drop
from keepkv.score.base import Score


@dataclass(frozen=True)
class Method:
    """What ``keepkv.Cache`` runs.

    sinks, window: the first tokens and the most recent tokens of a row that are always kept, part of the budget.
    store: name of the layout, or ``"auto"``: rectangular, and ragged where the allocation is.
    """

    score: Score
    allocate: Allocate = field(default_factory=Uniform)
    reduce: Reduce = field(default_factory=Drop)
    when: When = field(default_factory=When)
    store: str = "auto"
    sinks: int = 4
    window: int = 0
    name: str = "custom"
    options: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class MethodInfo:
    """What ``keepkv methods`` shows of a method."""

    name: str
    paper: str
    summary: str
    doc: str
    options: dict[str, Any]


METHODS: Registry[Method] = Registry("method")
_PAPERS: dict[str, str] = {}


def register_method(name: str, paper: str = "") -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Register a function ``(**options) -> Method`` under ``name``; its docstring and defaults are its help."""

    def enter(factory: Callable[..., Method]) -> Callable[..., Method]:
        _PAPERS[name] = paper
        return METHODS.register(name)(factory)

    return enter


def method_info(name: str) -> MethodInfo:
    """Paper, documentation and options of the method ``name``."""
    factory = METHODS.factory(name)
    doc = inspect.getdoc(factory) or ""
    options = {p.name: p.default for p in inspect.signature(factory).parameters.values()}
    return MethodInfo(name, _PAPERS.get(name, ""), doc.split("\n\n")[0].replace("\n", " "), doc, options)


def methods() -> list[MethodInfo]:
    """Every registered method."""
    return [method_info(name) for name in METHODS]
