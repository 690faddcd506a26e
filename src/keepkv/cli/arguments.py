"""Reads what people type: methods with options, files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keepkv.core.budget import Budget
from keepkv.core.options import Seed, taken
from keepkv.core.registry import known_as
from keepkv.core.when import When
from keepkv.engine.state import Settings
from keepkv.errors import KeepKVError
from keepkv.evaluation.setup import Variant
from keepkv.methods.base import expanded, make_method, method_info, method_name

_OF_CACHES = ("store", "seed", "calibration")  # options that are no method's
_WHEN = ("when.prefill", "when.every")
_WORDS = {"true": True, "false": False, "none": None}


def options(pairs: list[str], method: str) -> dict[str, Any]:
    """``["key=zip", "when.every=64"]`` as keyword arguments of ``method``; an unknown key names the nearest one.

    ``store``, ``seed`` and ``calibration`` (a file) are options of every cache. Raises ``KeepKVError`` where values do
    not fit.
    """
    known = [*(_WHEN if "when" in method_info(method).options else ()), *_OF_CACHES]
    known += [key for key in method_info(method).options if key != "when"]
    found: dict[str, Any] = {}
    when: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise KeepKVError(f"option {pair!r}: expected key=value")
        if key == "when" and _WHEN[0] in known:
            raise KeepKVError(f"option {pair!r}: give when.prefill=immediate, when.prefill=deferred or when.every=64")
        key = known_as(key, known, f"option of {method}")
        if key in _WHEN:
            when[key.removeprefix("when.")] = _value(text)
        else:
            found[key] = _value(text)
    found |= {"when": When(**when)} if when else {}
    make_method(method, {key: x for key, x in found.items() if key not in _OF_CACHES})
    if "seed" in found:
        taken(method, "seed", found["seed"], Seed)
    return found


def variant(text: str, more: Sequence[str] = ()) -> Variant:
    """``keepkv`` or ``keepkv:key=zip,window=64``; more: further pairs. A preset becomes the method it stands for."""
    name, _, rest = text.partition(":")
    name = method_name(name.strip())
    given = options([*(pair for pair in rest.split(",") if pair), *more], name)
    method, own = expanded(name)
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


def budget(text: str, variants: Sequence[Variant]) -> Budget:
    """The budget in ``text``; raises ``BudgetError`` where it is none, or one that a variant cannot keep to."""
    read = Budget.of(text)
    for one in variants:
        of_method = {key: x for key, x in one.options.items() if key not in _OF_CACHES}
        Settings(make_method(one.method, of_method), read)
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
