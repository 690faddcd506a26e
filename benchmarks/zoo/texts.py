"""Prose to calibrate on of which no task has a sentence.

    python -m benchmarks.zoo.texts > TEXTS

Tasks hide their facts in the documentation of Python (``keepkv.tasks.text``). Here are the docstrings of the modules
of the standard library that no task reads, less the sentences that it has from elsewhere.
"""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

from keepkv.tasks.text import MODULES, prose, sentences_of

NOT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def texts() -> str:
    """Sentences, each in a paragraph of its module's, without repeats."""
    root = Path(sysconfig.get_path("stdlib"))
    known = {sentence.strip() for sentence in prose()}
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root).with_suffix("")
        if inside.as_posix() not in MODULES and not NOT & set(inside.parts):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            docs = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
            sentences = (sentence for doc in docs if doc for sentence in sentences_of(doc))
            found |= dict.fromkeys(sentence for sentence in sentences if sentence.strip() not in known)
    return "".join(found).lstrip()


if __name__ == "__main__":
    print(texts().replace("\n", "\n\n"))
