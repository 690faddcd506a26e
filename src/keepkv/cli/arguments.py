"""Reads what people type: methods with options, files."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from keepkv.core.budget import Budget
from keepkv.core.calibration import loaded
from keepkv.core.options import Seed, taken
from keepkv.core.registry import known_as
from keepkv.core.when import When
from keepkv.engine.state import Settings
from keepkv.errors import KeepKVError
from keepkv.evaluation.setup import Variant
from keepkv.methods.base import Method, expanded, make_method, method_info, method_name, own_options
from keepkv.select import SELECTIONS, make_select
from keepkv.store import AUTO, CODECS, STORES, choose, settled
from keepkv.vision.reducers import REDUCERS

_OF_CACHES = ("store", "codec", "seed", "calibration", "select", "selected")  # options that are no method's
_PIECES = ("store", "codec", "select")  # of a cache; they have options of their own: codec.bits=2
_WHEN = ("when.prefill", "when.every", "when.cap")
_WORDS = {"true": True, "false": False, "none": None}


def options(pairs: list[str], method: str) -> dict[str, Any]:
    """``["key=zip", "when.every=64"]`` as keyword arguments of ``method``; an unknown key names the nearest one.

    ``store``, ``codec``, ``select``, ``selected``, ``seed`` and ``calibration`` (a file) are options of every cache;
    ``codec.bits=2`` is one of the codec. Raises ``KeepKVError`` where values do not fit.
    """
    known = [*(_WHEN if "when" in method_info(method).options else ()), *_OF_CACHES]
    known += [key for key in method_info(method).options if key != "when"]
    found: dict[str, Any] = {}
    when: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {piece: {} for piece in _PIECES}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise KeepKVError(f"option {pair!r}: expected key=value")
        if key == "when" and _WHEN[0] in known:
            raise KeepKVError(
                f"option {pair!r}: give when.prefill=immediate, when.prefill=deferred, when.every=64 or when.cap=2048"
            )
        piece, dot, own = key.partition(".")
        if dot and piece.lower() in _PIECES:
            inner[piece.lower()][own] = _value(text)
            continue
        key = known_as(key, known, f"option of {method}")
        if key in _PIECES:
            found[key] = text.strip()
        elif key in _WHEN:
            when[key.removeprefix("when.")] = _value(text)
        else:
            found[key] = _value(text)
    usual = method_info(method).options.get("when")  # what is not given stays as the method has it
    found |= {"when": replace(usual if isinstance(usual, When) else When(), **when)} if when else {}
    made = make_method(method, own_options(found))
    if "seed" in found:
        taken(method, "seed", found["seed"], Seed)
    return found | _inner(made, found, inner)


def _inner(method: Method, given: dict[str, Any], inner: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """``store_options``, ``codec_options``, ``select_options`` of the pairs ``inner`` by piece, where there are any."""
    layout, codec = choose(given.get("store") or method.store, given.get("codec", "none"), method.allocate.ragged)
    if inner["codec"] and codec == "none":
        names = ", ".join(repr(name) for name in CODECS if name != "none")
        raise KeepKVError(
            f"option 'codec.{next(iter(inner['codec']))}' is one of a codec: give codec=NAME too, of {names}"
        )
    if codec == AUTO:
        settled(codec, inner["codec"], Budget(share=1.0))  # refuses options
        codec = "none"
    select = given.get("select")
    if select is None and (inner["select"] or "selected" in given):
        first = next((f"select.{key}" for key in inner["select"]), "selected")
        raise KeepKVError(
            f"option {first!r} is one of a selection: give select=NAME too, of {', '.join(map(repr, SELECTIONS))}"
        )
    factories: dict[str, tuple[str, Any]] = {
        "store": (layout, STORES.factory(layout)), "codec": (codec, CODECS.factory(codec)),
        **({} if select is None else {"select": (select, SELECTIONS.factory(SELECTIONS.named(select)))}),
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for piece, (name, factory) in factories.items():
        known = [x for x in inspect.signature(factory).parameters if x not in ("held", "selected")]
        if pairs := inner[piece]:
            kind = f"option of {piece} {name!r}"
            found[f"{piece}_options"] = {known_as(key, known, kind): value for key, value in pairs.items()}
    CODECS.build(codec, **found.get("codec_options", {}))
    make_select(select, given.get("selected"), found.get("select_options", {}))
    return found


def size(text: str | None) -> tuple[int, int] | None:
    """``224x336`` as (height, width)."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.strip().isdigit() and int(side) for side in sides):
        raise KeepKVError(f"size {text!r}: expected HEIGHTxWIDTH in pixels, such as 448x448")
    return int(sides[0]), int(sides[1])


def variant(text: str, more: Sequence[str] = (), reducers: bool = False) -> Variant:
    """``keepkv`` or ``keepkv:key=zip,window=64``; more: further pairs. A preset becomes the method it stands for.
    reducers: whether those of vision features are taken too."""
    name, _, rest = text.partition(":")
    if reducers and name.strip().lower() in REDUCERS:
        if rest or more:
            raise KeepKVError(f"{name}: takes no options, given: {rest or ', '.join(more)}")
        return Variant(name.strip().lower())
    name = method_name(name.strip())
    asked = [*(pair for pair in rest.split(",") if pair), *more]
    files = [value.strip() for key, _, value in (pair.partition("=") for pair in asked) if key.strip() == "calibration"]
    method, own = expanded(name, [one.kind for one in loaded(files)])
    given = options(asked, method)
    return Variant(method, {**own, **given})


def pairs(texts: list[str]) -> dict[str, Any]:
    """``["capacity=8192"]`` as a dict."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise KeepKVError(f"option {text!r}: expected key=value")
        found[key.strip()] = _value(value)
    return found


def of_piece(piece: str, name: str | None, texts: Sequence[str] | None) -> list[str]:
    """Pairs for ``variant`` of ``--codec int4 --codec-option bits=8``; piece: "codec", "store" or "select"."""
    return [*([] if name is None else [f"{piece}={name}"]), *(f"{piece}.{text.strip()}" for text in texts or ())]


def budget(text: str, variants: Sequence[Variant]) -> Budget:
    """The budget in ``text``; raises ``BudgetError`` where it is none, or one that a variant cannot keep to."""
    read = Budget.of(text)
    for one in variants:
        Settings(make_method(one.method, own_options(one.options)), read)
    return read


def read_text(path: str) -> str:
    """The text of a file, or of stdin for ``-``."""
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise KeepKVError(f"cannot read {path!r}: {reason}") from error


def _value(text: str) -> Any:
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # of more digits than Python reads, or nested deeper
        return text
