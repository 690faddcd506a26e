"""What the options of a method mean: its docstring says it, in lines ``name: meaning`` behind ``Options:``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

_HEAD = "Options:"
_COMMON = {  # what these mean where a docstring does not say otherwise
    "sinks": "first tokens that are always kept; part of the budget",
    "window": "most recent tokens that are always kept; part of the budget",
    "prompt": "whether every token of the prompt is kept; a share is then one of the tokens that follow",
    "when": "when it compresses: when.prefill=immediate, deferred or none, when.every=N decoded tokens, and before "
    "when.cap=N slots per head would be passed",
    "score": "how slots are judged: a score by name",
    "allocate": "how the budget is shared by heads: an allocation by name",
}
_TYPES: dict[Any, str] = {int: "integer", float: "number", bool: "true or false", str: "text", NoneType: "none"}


def without_options(doc: str) -> str:
    """A docstring without its lines on options."""
    return doc.partition(f"\n{_HEAD}\n")[0].strip()


def meanings(doc: str, names: Iterable[str]) -> dict[str, str]:
    """What the options ``names`` mean, as far as it is said."""
    lines = doc.partition(f"\n{_HEAD}\n")[2]
    said = {name: " ".join(text.split()) for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", lines, re.M)}
    return {name: said.get(name, _COMMON.get(name, "")) for name in names}


def type_word(hint: Any) -> str:
    """What an option of this annotation takes: ``integer``, ``number or none``, ``text or Score``."""
    if get_origin(hint) is Annotated:
        return type_word(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(type_word(one) for one in get_args(hint))
    return _TYPES.get(hint) or str(getattr(hint, "__name__", hint))
