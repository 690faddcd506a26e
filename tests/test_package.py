"""What ``import keepkv`` gives: names without their weight, each what it says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import keepkv


def python(code: str) -> str:
    """What ``code`` prints in a process of its own."""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_importing_costs_nothing() -> None:
    assert (
        python("import sys, keepkv; keepkv.KeepKVError; print({'torch', 'transformers'} & set(sys.modules))")
        == "set()\n"
    )


def test_who_reads_results_imports_no_engine() -> None:
    """A report costs seconds less than with the code of models."""
    assert python("import sys, keepkv.report; print('keepkv.engine.cache' in sys.modules)") == "False\n"


def test_names_come_when_they_are_asked_for() -> None:
    """In one process of its own, as another test has imported everything here."""
    lines = (
        "import keepkv.methods",
        "from keepkv import methods",  # the function, not the room of its name
        "assert len(methods()) > 20 and keepkv.errors.BudgetError",
        "import keepkv.engine.model",  # which every cache needs: the attention is registered with it
        "from transformers import AttentionInterface",
        "assert 'keepkv' in AttentionInterface().valid_keys()",
    )
    python("\n".join(lines))


def test_type_checkers_and_the_table_say_the_same() -> None:
    tree = ast.parse(Path(keepkv.__file__).read_text(encoding="utf-8"))
    block = next(x for x in tree.body if isinstance(x, ast.If))
    told = {y.name: f"{x.module}" for x in block.body if isinstance(x, ast.ImportFrom) for y in x.names}
    assert told == {name: f"keepkv.{module}" for name, module in keepkv._MODULES.items()}
    assert sorted(told) == sorted(keepkv.__all__) and set(keepkv.__all__) <= set(dir(keepkv))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Cahce'"):
        keepkv.Cahce  # noqa: B018
    with pytest.raises(ImportError):
        from keepkv import nothing  # noqa: F401
