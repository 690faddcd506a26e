"""Files that are imported by name and packages that announce themselves: their names are known, their faults named."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from snippets import every_registry
from typer.testing import CliRunner

import keepkv
from keepkv import tasks
from keepkv.bench.worker import runner
from keepkv.cli.program import program
from keepkv.core import plugins
from keepkv.errors import KeepKVError
from keepkv.methods import METHODS

MINE = '''
import beside
import keepkv
from keepkv.methods import Method
from keepkv.score.base import SCORES

ran = beside.count()


@keepkv.register_score("{name}")
def mine(view):
    return view.slots.values.float().norm(dim=-1)


@keepkv.register_method("{name}")
def method(sinks: int = 4, window: int = 16) -> Method:
    """Of a file, or of a package."""
    return Method(SCORES.build("{name}"))
'''


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(plugins, "_files", {})
    monkeypatch.setattr(plugins, "_loaded", set())
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    (tmp_path / "beside.py").write_text("calls = []\ndef count():\n    calls.append(1)\n    return len(calls)\n")
    with every_registry():
        yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def file(folder: Path, name: str = "mine", text: str = MINE) -> Path:
    path = folder / f"{name.replace('-', '_')}.py"
    path.write_text(text.replace("{name}", name))
    return path


def test_a_file_is_run_once_with_what_lies_beside_it(tmp_path: Path) -> None:
    path = file(tmp_path)
    first = plugins.load_file(path)
    assert plugins.load_file(str(path)) is first and plugins.imported() == [first]
    assert sys.modules["imported.mine"].ran == 1 and len(first.digest) == 16
    assert METHODS.build("mine").name == "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import keepkv\n\n1 / 0\n", r"bad\.py, line 3: ZeroDivisionError: division by zero"),
        ("x = (\n", r"bad\.py, line 1: SyntaxError: '\(' was never closed"),
        ("import no_such_module\n", r"bad\.py, line 1: ModuleNotFoundError: No module named"),
        ("import keepkv\nkeepkv.register_score('snapkv')(print)\n", r"bad\.py, line 2: NameTaken: score 'snapkv' is"),
        ("def f():\n    raise SystemExit(3)\nf()\n", r"bad\.py, line 2: SystemExit: 3"),
    ],
)
def test_errors_name_the_file_and_the_line(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(KeepKVError, match=words):
        plugins.load_file(file(tmp_path, "bad", text))
    assert plugins.imported() == [] and "imported.bad" not in sys.modules


def test_what_is_no_python_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeepKVError, match=r"cannot import 'gone\.py': No such file"):
        plugins.load_file("gone.py")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(KeepKVError, match=r"no Python file, whose name ends in \.py"):
        plugins.load_file(tmp_path / "notes.txt")


def package(folder: Path, name: str, point: str, text: str) -> None:
    """As pip installs it: a module, and its metadata with an entry point."""
    (folder / f"{name}_plugin.py").write_text(text.replace("{name}", name))
    info = folder / f"{name}_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[keepkv.plugins]\n{name} = {point}\n")


def test_installed_packages_are_loaded_when_a_name_is_not_known(tmp_path: Path) -> None:
    text = MINE.replace("ran = beside.count()", "").replace("import beside\n", "")
    package(tmp_path, "whole", "whole_plugin", text)
    late = "def enter():\n" + textwrap.indent(text, "    ")
    package(tmp_path, "late", "late_plugin:enter", late)
    package(tmp_path, "broken", "broken_plugin", "import no_such_module\n")
    sys.path.append(str(tmp_path))
    assert keepkv.method_info("snapkv") and "whole_plugin" not in sys.modules  # nothing is loaded for known names
    with pytest.warns(UserWarning, match=r"plugin 'broken' of broken-plugin could not be loaded.*no_such_module"):
        assert METHODS.build("whole").name == "whole"
    assert {"late", "whole"} <= {info.name for info in keepkv.methods()}  # and the broken one is named only once
    with pytest.raises(KeepKVError, match="unknown method 'broken'"):
        METHODS.build("broken")


def test_a_plugin_may_register_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
    text = "from keepkv import tasks\n\n\ndef build(rng, count, length):\n    return tasks.Item('a', ())\n\n\n"
    package(
        tmp_path, "asking", "asking_plugin", text + "tasks.register(tasks.Task('asking', 'for this test', build))\n"
    )
    sys.path.append(str(tmp_path))
    assert tasks.get("asking").summary == "for this test" and "asking" in tasks.names()


def run(*args: str) -> Any:
    return CliRunner().invoke(program, list(args))


def test_verbs_take_files(tmp_path: Path) -> None:
    path = file(tmp_path)
    shown = run("methods", "mine", "--import", str(path))
    assert shown.exit_code == 0 and "Of a file, or of a package." in shown.output, shown.output
    words = ["--segments", "1", "--context", "60", "--continue", "8", "--greedy", "2", "-b", "0.5", "--json"]
    done = run("fidelity", "--import", str(path), "-m", "mine", *words)
    assert done.exit_code == 0, done.output
    rows = {row["method"]: row for row in json.loads(done.stdout)}
    assert rows["mine"]["imports"] == {"mine.py": plugins.imported()[0].digest}
    refused = run("generate", "--import", str(tmp_path / "gone.py"), "--prompt", "a")
    assert refused.exit_code == 2 and "cannot import" in refused.output


def test_a_worker_of_bench_imports_them_too(tmp_path: Path) -> None:
    spec = {"imports": [str(file(tmp_path))], "library": "keepkv", "method": "mine", "options": {}}
    runner(SimpleNamespace(device=torch.device("cpu")), spec)
    assert METHODS.build("mine").name == "mine"
