"""Docstrings as the reference shows them: what they say of parameters and fields becomes a list."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Parameters(griffe.Extension):
    """In docstrings of this project a line ``name: what it is`` explains a parameter, a field or several of them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None and (obj.is_class or obj.is_function) and (names := names_of(obj)):
            obj.docstring.value = listed(obj.docstring.value, names)


def names_of(obj: griffe.Object) -> set[str]:
    names = {parameter.name for parameter in getattr(obj, "parameters", ())}
    return names | {name for name, member in obj.members.items() if not member.is_alias and member.is_attribute}


def listed(text: str, names: set[str]) -> str:
    """``text`` with an item of a list for each of ``names`` that begins a sentence or a line and has a colon."""
    one = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    label = rf"(?:{one})(?:, (?:{one}))*(?: \([^)]*\))?(?:, (?:{one})(?: \([^)]*\))?)*(?: [a-z0-9]+)?"
    start = re.compile(rf"(?:^|(?<=\. ))({label}): ", re.MULTILINE)
    paragraphs = []
    for paragraph in text.split("\n\n"):
        head, *rest = start.split(paragraph)
        if not rest:
            paragraphs.append(paragraph)
            continue
        items = [f"- `{name}`: {' '.join(said.split())}" for name, said in zip(rest[::2], rest[1::2], strict=True)]
        paragraphs += [block for block in (head.rstrip(), "\n".join(items)) if block]
    return "\n\n".join(paragraphs)
