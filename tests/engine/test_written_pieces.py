"""Pieces that a reader writes from the documentation's pages hold every invariant that ours hold."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_invariants
import torch
from matrix import SMALL
from snippets import blocks, every_registry

import keepkv
from keepkv.reduce.base import REDUCTIONS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("write-a-method.md", "write-a-piece.md", "write-a-store.md")
PIECES: dict[str, tuple[str, dict[str, Any]]] = {
    "a score": ("adakv", {"score": "value-norm", **SMALL}),
    "an allocation of layers": ("keepkv", {"allocate": "ends", **SMALL}),
    "an allocation of heads": ("keepkv", {"score": "snapkv", "allocate": "relative", **SMALL}),
    "a reduction": ("test-neighbour", {}),
    "a codec": ("snapkv", {"codec": "identity", **SMALL}),
    "a codec on ragged heads": ("adakv", {"codec": "identity", **SMALL}),
    "a codec that narrows": ("snapkv", {"codec": "narrow", **SMALL}),
    "a layout": ("snapkv", {"store": "dense-exact-growth", **SMALL}),
}
ONCE = keepkv.When()
INVARIANTS = [
    (name, every)
    for name, test in sorted(vars(test_invariants).items())
    if name.startswith("test_")
    for every in ((None, 3) if "every" in inspect.signature(test).parameters else (0,))
]


@pytest.fixture(scope="module", autouse=True)
def _written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with every_registry(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("pages"))  # where the pages write their files
        for page in PAGES:
            names: dict[str, Any] = {"__name__": "__main__"}
            for block in blocks(DOCS / page, "python"):
                exec(compile(block, page, "exec", dont_inherit=True), names)
        patch.undo()

        @keepkv.register_method("test-neighbour")
        def neighbour(sinks: int = 2, when: keepkv.When = ONCE) -> keepkv.Method:
            """Merges what leaves into its neighbour."""
            return keepkv.Method(keepkv.score.KeyDiff(), reduce=REDUCTIONS.build("neighbour"))

        yield


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda pair: pair[0] + (f"-{pair[1]}" if pair[1] else ""))
@pytest.mark.parametrize("piece", PIECES)
def test_a_written_piece(piece: str, invariant: tuple[str, int | None], tmp_path: Path) -> None:
    name, every = invariant
    test = getattr(test_invariants, name)
    more: dict[str, Any] = {"tmp_path": tmp_path} if "tmp_path" in inspect.signature(test).parameters else {}
    torch.manual_seed(0)
    test(arch="llama", method=PIECES[piece], **more, **({} if every == 0 else {"every": every}))
