"""Reads what people type: methods with options, files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from keepkv.core.options import Seed, taken
from keepkv.core.when import When
from keepkv.errors import KeepKVError, UnknownName
from keepkv.evaluation.setup import Variant
from keepkv.methods.base import make_method, method_info

_WORDS = {"true": True, "false": False, "none": None}


def options(pairs: list[str], method: str) -> dict[str, Any]:
    """``["key=zip", "when.every=64"]`` as keyword arguments of ``method``; an unknown key names the nearest one.

    ``store``, ``seed`` and ``calibration`` (a file) are options of every cache. Raises ``KeepKVError`` where values do
    not fit.
    """
    known = [*method_info(method).options, "store", "seed", "calibration"]
    found: dict[str, Any] = {}
    when: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise KeepKVError(f"option {pair!r}: expected key=value")
        if key.partition(".")[0] not in known:
            raise UnknownName(f"option of {method}", key, known)
        if key in ("when.prefill", "when.every"):
            when[key.removeprefix("when.")] = _value(text)
        elif key == "when":
            raise KeepKVError(f"option {pair!r}: give when.prefill=immediate, when.prefill=deferred or when.every=64")
        else:
            found[key] = _value(text)
    found |= {"when": When(**when)} if when else {}
    make_method(method, {key: x for key, x in found.items() if key not in ("store", "seed", "calibration")})
    if "seed" in found:
        taken(method, "seed", found["seed"], Seed)
    return found


def variant(text: str) -> Variant:
    """``keepkv`` or ``keepkv:key=zip,window=64``."""
    name, _, rest = text.partition(":")
    return Variant(name, options([pair for pair in rest.split(",") if pair], name))


def pairs(texts: list[str]) -> dict[str, Any]:
    """``["capacity=8192"]`` as a dict."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise KeepKVError(f"option {text!r}: expected key=value")
        found[key.strip()] = _value(value)
    return found


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
