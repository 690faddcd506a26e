"""How the source is kept: which way imports run, how long files are, that everything says what it is."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

import keepkv

SOURCE = Path(keepkv.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
ARCHITECTURE = Path(__file__).parents[1] / "docs" / "architecture.md"

# Rooms from the ground up. A room is a folder; it knows what stands below it, and no other room of its floor.
FLOORS = [
    line.split()
    for line in """\
errors
core
kernels
attention observe
store allocate
spans select
score
reduce
methods
engine
embedded measure plan video
vision
metrics models
tasks
asking
evaluation
training
serve
calibrate characterize
report
bench
cli
integrations __main__""".splitlines()
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
ENGINE = FLOOR["engine"]  # transformers is known from here on


def room_of(path: Path) -> str:
    """The folder of a module at the top of the package, or the module itself where it lies in none."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> set[str]:
    """Dotted names that a module imports anywhere in it, for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def rooms_known(path: Path) -> set[str]:
    """Other rooms that a module imports from; the package itself stands above all."""
    known = {name.split(".")[1] for name in imports(tree_of(path)) if name.startswith("keepkv.")}
    return {room if room in FLOOR else "keepkv" for room in known} - {room_of(path)}


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in FILES} - {"__init__"} == set(FLOOR)


def first_sentence(room: str) -> str:
    """Of the docstring of a room."""
    path = SOURCE / room / "__init__.py" if (SOURCE / room).is_dir() else SOURCE / f"{room}.py"
    text = " ".join((ast.get_docstring(tree_of(path)) or "").split())
    return re.split(r"(?<=[.]) ", text)[0]


def tree() -> str:
    """Rooms by floor, from the ways in down to the ground, each with what it says of itself."""
    wide = max(map(len, FLOOR))
    return "\n".join(
        f"{FLOOR[room]:2}  {room:{wide}}  {first_sentence(room)}" for rooms in reversed(FLOORS) for room in rooms
    )


def test_the_architecture_page_shows_the_tree() -> None:
    page = ARCHITECTURE.read_text(encoding="utf-8")
    assert f"```text\n{tree()}\n```" in page, f"docs/architecture.md must show, in a block of text:\n{tree()}"


def test_files_of_the_walks_exist() -> None:
    rooms = "|".join(FLOOR)
    named = re.findall(rf"(?<![\w/])((?:{rooms})/[\w/]*(?:\.py)?)", ARCHITECTURE.read_text(encoding="utf-8"))
    assert len(named) > 20 and not [name for name in named if not (SOURCE / name).exists()]


def test_imports_run_downwards() -> None:
    upwards = {
        (name_of(path), room)
        for path in FILES
        if path != SOURCE / "__init__.py"
        for room in rooms_known(path)
        if FLOOR.get(room, len(FLOORS)) >= FLOOR[room_of(path)]
    }
    assert not upwards


def test_no_imports_run_in_circles() -> None:
    """Those inside of functions and for type checkers count too; a package is what its ``__init__`` is."""
    module = {f"keepkv.{name_of(path)}".removesuffix(".__init__"): path for path in FILES}
    known = {
        name: {x if x in module else x.rpartition(".")[0] for x in imports(tree_of(path))} & module.keys() - {name}
        for name, path in module.items()
    }
    TopologicalSorter(known).prepare()  # raises CycleError, which names the circle


def test_transformers_is_known_from_the_engine_on() -> None:
    below = [path for path in FILES if room_of(path) in FLOOR and FLOOR[room_of(path)] < ENGINE]
    assert not [name_of(path) for path in below if {x.split(".")[0] for x in imports(tree_of(path))} & {"transformers"}]


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
