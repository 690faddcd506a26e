"""How the source is kept: which way imports run, how long files are, that everything says what it is."""

from __future__ import annotations

import ast
from pathlib import Path
from statistics import median

import pytest

import keepkv

SOURCE = Path(keepkv.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
PARTS = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in FILES}

# From the ground up; a module imports from its own floor and from those below it.
FLOORS = [
    line.split()
    for line in """\
errors slots rope spread registry budget clock
kernels
score allocate reduce store when attention spans
methods
cache layer look compress plan attach receipt report persistence context reread rehearse attention.interface
models tasks metrics evaluation
bench
cli serve integrations""".splitlines()
]


def floor(name: str) -> int:
    """Of ``attention.interface`` if that is entered, else of ``attention``; of a name of keepkv itself the top."""
    if name.split(".")[0] not in PARTS:
        return len(FLOORS) - 1
    for entry in (name, name.split(".")[0]):
        found = [i for i, entries in enumerate(FLOORS) if entry in entries]
        if found:
            return found[0]
    raise AssertionError(f"keepkv.{name} has no floor yet: enter it in FLOORS")


def name_of(path: Path) -> str:
    """``attention.interface``, of two levels at most."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts[:2])


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> set[str]:
    """What of keepkv a module imports when it runs: imports for type checkers only do not count."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "keepkv":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "keepkv"]
        else:
            found |= imports(node)
            continue
        found |= {".".join(name.split(".")[1:3]) for name in names}
    return found


def test_imports_run_downwards() -> None:
    upwards = {
        (name_of(path), name)
        for path in FILES
        if path != SOURCE / "__init__.py"
        for name in imports(tree_of(path))
        if floor(name) > floor(name_of(path))
    }
    assert not upwards


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {path: n for path, n in lengths.items() if n > 400}
    assert median(lengths.values()) <= 120


def test_every_module_says_what_it_is() -> None:
    assert not [name_of(path) for path in FILES if not ast.get_docstring(tree_of(path))]


@pytest.mark.parametrize("name", keepkv.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    value = getattr(keepkv, name)
    assert not callable(value) or (value.__doc__ or "").strip()


def test_nothing_is_left_unfinished() -> None:
    assert not [name_of(path) for path in FILES if {"TODO", "FIXME", "XXX"} & set(path.read_text("utf-8").split())]


def test_no_error_is_swallowed_whole() -> None:
    """``except`` of everything, with nothing done about it."""
    silent = [
        (name_of(path), node.lineno)
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and all(isinstance(line, ast.Pass) for line in node.body)
    ]
    assert not silent
