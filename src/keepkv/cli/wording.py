"""The wording of help texts: what docstrings and annotations say, as a terminal shows it."""

from __future__ import annotations

import re
from enum import Enum
from types import NoneType
from typing import Any, get_args

_WORDS = {str: "TEXT", int: "INTEGER", float: "NUMBER"}


def escaped(text: str) -> str:
    """``text`` so that rich prints it as it is: ``[plots]`` is no markup."""
    return re.sub(r"\\*\[", lambda _: r"\[", text)


def flowed(doc: str) -> str:
    """A docstring with each paragraph on one line, to be wrapped where it is shown; one that begins with ``\\b`` keeps
    its lines."""
    paragraphs = doc.split("\n\n")
    return escaped("\n\n".join(x if x.startswith("\b") else " ".join(x.split()) for x in paragraphs))


def value_word(hint: Any) -> str | None:
    """What an option of this annotation takes: ``INTEGER``, ``a|b``; None where that is not known."""
    inner = [x for x in get_args(hint) if x is not NoneType]
    if inner:
        return value_word(inner[0])
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "|".join(str(one.value) for one in hint)
    return _WORDS.get(hint)


def without_types(parameters: list[Any]) -> list[Any]:
    """``parameters`` of the command line, of which flags and arguments show no type: arguments are named by one."""
    for one in parameters:
        if getattr(one, "is_flag", False) and one.metavar is None:
            one.metavar = ""
        if one.param_type_name == "argument":
            one.display_type_rich = lambda **context: None
    return parameters
