"""What the site says of each method, from its docstring and its pieces: ``python docs/site/method_pages.py`` writes the
list of docs/methods.md; the pages of single methods are made with the site."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

import keepkv
from keepkv.methods import MethodInfo

PAGE = Path(__file__).parents[1] / "methods.md"
BEGIN, END = "## Every method\n", "\nYour own is a function"


def ordered() -> list[MethodInfo]:
    """Methods of this package by family, ours first."""
    own = [info for info in keepkv.methods() if info.group != "Yours."]
    return sorted(own, key=lambda info: (not info.group.startswith("Ours"), info.group, info.name))


def listing() -> str:
    """The section of docs/methods.md that lists every method, a table for each family."""
    parts = [BEGIN, "`keepkv methods NAME` shows the formula, the options and the defaults of each; every one of them"]
    parts[-1] += " runs the same tests.\n"
    for group, infos in groupby(ordered(), key=lambda info: info.group):
        parts.append(f"**{group}**\n")
        rows = [f"| `{x.name}` | {cell(x.summary)} | {cell('; '.join(x.needs))} | {x.paper} |" for x in infos]
        parts.append("\n".join(["| method | what it does | needs | paper |", "|---|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def page(info: MethodInfo) -> str:
    """The page of one method."""
    parts = [f"# {info.name}", f"*{info.group}*" + (f" {paper(info.paper)}" if info.paper else ""), marked(info.doc)]
    facts = [f"- needs {x}" for x in info.needs] + [f"- {x}" for x in info.does]
    parts += ["## What it needs and does", "\n".join(facts)] if facts else []
    if info.options:
        rows = [
            f"| `{name}` | {cell(info.types.get(name, ''))} | `{default}` | {cell(info.meanings.get(name, ''))} |"
            for name, default in info.options.items()
        ]
        parts += ["## Options", "\n".join(["| option | takes | default | what it is |", "|---|---|---|---|", *rows])]
    use = f'cache = keepkv.Cache(model, "{info.name}", budget=0.25)\nmodel.generate(**inputs, cache=cache)'
    parts += ["## Use", f"```python\n{use}\nprint(cache.report())\n```", "[All methods](../methods.md#every-method)"]
    return "\n\n".join(parts) + "\n"


def linked(markdown: str) -> str:
    """The names in the list of docs/methods.md as links to their pages."""
    head, begin, rest = markdown.partition(BEGIN)
    return head + begin + re.sub(r"^\| `([a-z0-9-]+)` \|", r"| [`\1`](methods/\1.md) |", rest, flags=re.MULTILINE)


def paper(named: str) -> str:
    """A paper as a link, where it is on arXiv."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", named)


def marked(doc: str) -> str:
    """A docstring as Markdown: only what stands in backticks is code, and nothing else is markup."""
    parts = doc.split("``")
    parts[::2] = [re.sub(r"([*_<|])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def cell(text: str) -> str:
    """Text in a cell of a table."""
    return text.replace("``", "`").replace("|", "\\|")


def with_listing(markdown: str) -> str:
    """docs/methods.md with the list of today."""
    head, _, rest = markdown.partition(BEGIN)
    return head + listing() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(with_listing(PAGE.read_text("utf-8")), encoding="utf-8")
