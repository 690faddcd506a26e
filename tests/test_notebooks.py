"""The notebooks in ``examples/`` run from their first cell to their last, and may be run again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from snippets import as_installed, every_registry

import keepkv

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))

SAID = {"use-it": "12 of 12 right with", "write-a-method": "adakv:score=surprise "}  # what only a whole run prints


def cells(path: Path) -> list[dict[str, Any]]:
    held: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["cells"]
    return held


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
@pytest.mark.filterwarnings(
    "ignore:.*items of each task", "ignore:of .* tokens, a budget of", "ignore:.*non-interactive"
)
def test_cells_run_in_order_and_again(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, Any] = {"__name__": "__main__"}
    began = time.monotonic()
    with every_registry():
        for number, cell in enumerate(cells(path)):
            if cell["cell_type"] == "code":
                code = compile(
                    as_installed("".join(cell["source"])), f"{path.name}, cell {number}", "exec", dont_inherit=True
                )
                for _ in range(2 if "register_" in "".join(cell["source"]) else 1):
                    exec(code, names)
    assert SAID[path.stem] in capsys.readouterr().out and time.monotonic() - began < 60
    matplotlib.pyplot.close("all")


def test_there_are_two_and_their_outputs_are_stripped() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["use-it", "write-a-method"]
    for path in NOTEBOOKS:
        assert not [cell for cell in cells(path) if cell.get("outputs") or cell.get("execution_count")]
        assert all(keepkv.__name__ in "".join(cell["source"]) for cell in cells(path)[:2])
