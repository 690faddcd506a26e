"""A method: a named choice of score, allocation, reduction, store and schedule."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec

from keepkv.allocate.base import Allocate
from keepkv.allocate.uniform import Uniform
from keepkv.core.options import Checked, Count, arguments, hints_of
from keepkv.core.registry import Registry, known_as
from keepkv.core.when import When
from keepkv.errors import KeepKVError
from keepkv.methods.explain import meanings, type_word, without_options
from keepkv.methods.presets import PRESETS
from keepkv.methods.traits import does, group_of, needs
from keepkv.reduce.base import Reduce
from keepkv.reduce.drop import Drop
from keepkv.score.base import Score

P = ParamSpec("P")
FIELDS = ("sinks", "window", "when", "prompt")  # options of these names are the fields of these names
OF_CACHES = (  # beside a method, in any cache
    "store", "codec", "store_options", "codec_options", "seed", "calibration", "select", "selected", "select_options",
)  # fmt: skip


@dataclass(frozen=True)
class Method(Checked):
    """What ``keepkv.Cache`` runs.

    sinks, window: the first tokens and the most recent tokens of a row that are always kept, part of the budget.
    store: name of the layout, or ``"auto"``: rectangular, and ragged where the allocation is. together: whether the
    heads of a layer keep the same tokens, those whose scores are highest on the mean over heads. prompt: whether every
    token of the prompt is kept, as ``SpanPolicy.prompt`` has it. led_by: the layer, counted among those that are
    compressed, whose scores, in the mean over its heads, are those of all later ones; None: each has its own.
    name, options: under which the method is registered, and every option it was made with: what a saved cache says of
    its method. ``register_method`` sets both.
    """

    score: Score
    allocate: Allocate = field(default_factory=Uniform)
    reduce: Reduce = field(default_factory=Drop)
    when: When = field(default_factory=When)
    store: str = "auto"
    sinks: Count = 4
    window: Count = 0
    together: bool = False
    prompt: bool = False
    led_by: Count | None = None
    name: str = "custom"
    options: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.led_by is not None and not self.allocate.joint:
            raise KeepKVError(
                f"method {self.name!r}: led_by={self.led_by} needs the scores of all layers together, and its "
                "allocation looks at one layer at a time: give a joint one, such as FirstLayers"
            )
        if self.allocate.needs_density and not self.score.tells_density:
            raise KeepKVError(
                f"method {self.name!r}: {type(self.allocate).__name__} shares by the density of attention, and "
                f"{type(self.score).__name__} does not tell it: give a score that does, such as VLCache"
            )
        # So that dataclasses.replace(method, when=…) does not leave an option that contradicts its field.
        present = {name: getattr(self, name) for name in FIELDS if name in self.options}
        object.__setattr__(self, "options", {**self.options, **present})

    @property
    def changed(self) -> dict[str, Any]:
        """The options that differ from the method's defaults."""
        defaults = method_info(self.name).options if self.name in METHODS else {}
        return {name: x for name, x in self.options.items() if name not in defaults or x != defaults[name]}


@dataclass(frozen=True)
class MethodInfo:
    """What ``keepkv methods`` shows of a method.

    options: by name, with their defaults; types, meanings: in words. group: its family. needs, does: see
    ``methods.traits``.
    """

    name: str
    paper: str
    summary: str
    doc: str
    options: dict[str, Any]
    types: dict[str, str] = field(default_factory=dict)
    meanings: dict[str, str] = field(default_factory=dict)
    group: str = ""
    needs: list[str] = field(default_factory=list)
    does: list[str] = field(default_factory=list)


METHODS: Registry[Method] = Registry("method")
_PAPERS: dict[str, str] = {}


def register_method(
    name: str, paper: str = "", *, replace: bool = False
) -> Callable[[Callable[P, Method]], Callable[P, Method]]:
    """Register a function ``(**options) -> Method`` under ``name``; its signature and docstring are its help:
    lines ``name: meaning`` behind one of ``Options:`` say what an option is.

    The function chooses the pieces. The ``Method`` gets its name, all options (given or default), and ``sinks``,
    ``window``, ``when`` and ``prompt`` from the options of these names, where the signature has them. Registering the
    same function again takes its former place; ``replace`` takes that of another one.
    """

    def enter(factory: Callable[P, Method]) -> Callable[P, Method]:
        signature = inspect.signature(factory)
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values()):
            raise KeepKVError(f"method {name!r}: {signature} has options without a name; name each in the signature")

        @wraps(factory)
        def build(*args: P.args, **kwargs: P.kwargs) -> Method:
            bound = arguments(f"method {name!r}", factory, *args, **kwargs)
            made = factory(*bound.args, **bound.kwargs)
            own = {field: x for field, x in bound.arguments.items() if field in FIELDS}
            return dataclasses.replace(made, name=name, options=bound.arguments, **own)

        METHODS.register(name, replace=replace)(build)
        _PAPERS[name] = paper
        return build

    return enter


def make_method(method: str | Method, options: Mapping[str, Any], kinds: Iterable[str] = ()) -> Method:
    """The method of a name or a preset, made with ``options``; a ``Method`` as it is, which takes none. kinds: of the
    calibrations that there are, by which a preset may choose.

    Raises ``UnknownName`` where the name is not registered, ``KeepKVError`` where the options do not fit.
    """
    if isinstance(method, Method):
        if options:
            raise KeepKVError(f"options {sorted(options)} were given beside a Method object; put them into the Method")
        return method
    name, own = expanded(method, kinds)
    return METHODS.factory(name)(**{**own, **options})


def own_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the ``options`` of a cache that are its method's."""
    return {name: x for name, x in options.items() if name not in OF_CACHES}


def method_info(name: str) -> MethodInfo:
    """Paper, documentation and options of the method ``name``, or of what a preset of that name stands for."""
    method, own = expanded(name)
    factory = METHODS.factory(method)
    doc = inspect.getdoc(factory) or ""
    options = {p.name: p.default for p in inspect.signature(factory).parameters.values()} | own
    hints = hints_of(factory)
    unknown = any(x is inspect.Parameter.empty for x in options.values())  # what it is made of depends on them
    made = None if unknown else factory(**own)
    return MethodInfo(
        method,
        _PAPERS.get(method, ""),
        doc.split("\n\n")[0].replace("\n", " "),
        without_options(doc),
        options,
        {name: type_word(hints.get(name, Any)) for name in options},
        meanings(doc, options),
        group_of(factory),
        needs(made.score, made.allocate, made.reduce) if made else [],
        does(made.score, made.allocate, made.reduce, made.when) if made else [],
    )


def method_name(name: str) -> str:
    """``name`` as the method or the preset that it means is written; raises ``UnknownName`` with the nearest one."""
    # Asked first, so that packages are loaded for other names alone.
    known = isinstance(name, str) and (name in PRESETS or name in METHODS)
    return name if known else known_as(name, [*METHODS, *PRESETS], METHODS.kind)


def expanded(name: str, kinds: Iterable[str] = ()) -> tuple[str, dict[str, Any]]:
    """The method that ``name``, a method's or a preset's, stands for, and the preset's options; kinds: of the
    calibrations that there are."""
    known = method_name(name)
    preset = PRESETS.get(known)
    if preset is None:
        return known, {}
    method, options = preset.given(kinds)
    return method, dict(options)


def methods() -> list[MethodInfo]:
    """Every registered method."""
    return [method_info(name) for name in METHODS]
