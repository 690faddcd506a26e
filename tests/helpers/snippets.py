"""Code blocks of pages: run as they stand, beside the output that the page shows; registries are left as they were.

``python tests/helpers/snippets.py PAGE…`` writes the outputs of pages anew.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from keepkv.allocate.base import ALLOCATIONS
from keepkv.core.registry import Registry
from keepkv.engine.versions import CACHE
from keepkv.methods.base import METHODS
from keepkv.reduce.base import REDUCTIONS
from keepkv.score.base import SCORES
from keepkv.store import CODECS, STORES

REGISTRIES: tuple[Registry[Any], ...] = (SCORES, ALLOCATIONS, REDUCTIONS, METHODS, STORES, CODECS)

FENCE = re.compile(
    r"^```(python|bash)\n(.*?)^```\n(?:\n```text title=\"Output\"\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE
)
UNSTEADY = re.compile(r"\d[\d.]*(?= (?:s|ms|seconds?)\b)")  # times


@dataclass(frozen=True)
class Snippet:
    """A block of code, as the installed transformers takes it, and the output that is shown under it."""

    language: str
    code: str
    output: str | None


def snippets(text: str) -> list[Snippet]:
    return [Snippet(kind, as_installed(code), output or None) for kind, code, output in FENCE.findall(text)]


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of ``page`` in ``language``, as the installed transformers takes them."""
    text = as_installed(page.read_text(encoding="utf-8"))
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def as_installed(text: str) -> str:
    """Code of a page or an example, with the cache's argument named as the installed transformers names it."""
    return re.sub(r"\bcache=(?=\w+[.,)])", f"{CACHE}=", text)


def runs(snippet: Snippet) -> bool:
    """Python always; commands where their output is shown."""
    return snippet.language == "python" or snippet.output is not None


def run(snippet: Snippet, names: dict[str, Any], label: str) -> str:
    """What ``snippet`` prints; ``names`` are the variables of the page so far."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if snippet.language == "python":
            exec(compile(snippet.code, label, "exec", dont_inherit=True), names)
        else:
            for line in snippet.code.replace("\\\n", " ").splitlines():
                command(shlex.split(line, comments=True))
    return "".join(f"{line.rstrip()}\n" for line in printed.getvalue().strip("\n").splitlines())


def command(words: list[str]) -> None:
    """``keepkv …`` in this process: the console script that pyproject.toml names."""
    from keepkv.cli.main import app

    assert words[0] == "keepkv", words
    before = sys.argv
    sys.argv = words
    try:
        app()
    except SystemExit as exit:
        assert not exit.code, f"{shlex.join(words)} exits with {exit.code}"
    finally:
        sys.argv = before


def agrees(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed; … in it stands for anything."""
    return re.fullmatch(re.escape(shown.strip()).replace("…", ".*?"), printed.strip(), re.DOTALL) is not None


def rewritten(text: str) -> str:
    """``text`` with every output that it shows as it is today; what agrees is left, times become …."""
    names: dict[str, Any] = {"__name__": "__main__"}

    def one(found: re.Match[str]) -> str:
        kind, code, shown = found.groups()
        snippet = Snippet(kind, as_installed(code), shown)
        if not runs(snippet):
            return found.group()
        printed = run(snippet, names, "snippet")
        if shown is None or agrees(shown, printed):
            return found.group()
        return found.group().removesuffix(f"{shown}```\n") + UNSTEADY.sub("…", printed) + "```\n"

    return FENCE.sub(one, text)


@contextmanager
def every_registry() -> Iterator[None]:
    """Names that are registered inside are gone afterwards."""
    before = [dict(registry._factories) for registry in REGISTRIES]
    try:
        yield
    finally:
        for registry, factories in zip(REGISTRIES, before, strict=True):
            registry._factories = factories


if __name__ == "__main__":
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    for page in [Path(name).resolve() for name in sys.argv[1:]]:
        with TemporaryDirectory() as folder, every_registry():
            os.chdir(folder)
            page.write_text(rewritten(page.read_text("utf-8")), encoding="utf-8")
            os.chdir("/")
