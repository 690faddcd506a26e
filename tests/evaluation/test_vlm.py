"""Evaluations of models that see: the rows of text, reducers beside methods, and where in a picture tokens survive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from seeing_tokens import Letters

from helpers import vision_zoo as zoo
from keepkv import tasks
from keepkv.errors import KeepKVError
from keepkv.evaluation.rows import ITEMS, MAPS, ItemRow, MapRow
from keepkv.evaluation.runner import evaluate
from keepkv.evaluation.setup import HELD_OUT, Setup, Variant
from keepkv.evaluation.vision import aggregates, noise_floor
from keepkv.measure.files import read_rows
from keepkv.tasks.asking import encode
from keepkv.vision.seeing import Seeing

pytestmark = pytest.mark.filterwarnings("ignore:.* items of each task", "ignore:of .* tokens, a budget of")
SIZE = (48, 48)
METHODS = ("vl-cache", "text-first", "fastv", "look-m:within=modality", "visionzip", "prumerge-plus")


def of(name: str) -> tuple[Any, Seeing]:
    size = SIZE if "qwen" in name else None
    return zoo.model(name), Seeing(zoo.model(name), Letters(), size)


def setup(*methods: str, **changes: Any) -> Setup:
    from keepkv.cli import arguments

    made = tuple(arguments.variant(one, reducers=True) for one in methods)
    held: dict[str, Any] = {"tasks": ("vision-images", "vision-scene"), "budgets": (0.8,), "lengths": (220,)}
    return Setup("tiny", variants=made, items=2, batch=1, sinks=2, window=4, size=SIZE, **{**held, **changes})


@pytest.mark.parametrize("name", ["qwen2-vl", "llava"])
def test_rows_of_methods_and_reducers(name: str, tmp_path: Path) -> None:
    model, seeing = of(name)
    cells = evaluate(model, seeing, setup(*METHODS), tmp_path)
    rows = read_rows(tmp_path, ITEMS, ItemRow)
    bad = {row.method: row.error for row in rows if row.error is not None}
    # Two layers of which FastV keeps both whole leave nothing to share.
    assert set(bad) == {"fastv"} and "BudgetError" in str(bad["fastv"])
    full = {(row.task, row.seed): row for row in rows if row.method == "full"}
    for row in rows:
        whole = full[row.task, row.seed]
        if row.error is not None:
            continue
        assert row.tokens == whole.tokens and row.full_bytes == whole.full_bytes
        if row.method != "full":
            assert row.compressed and row.slots <= 0.8 * row.tokens  # type: ignore[operator]
            assert 0.7 * row.tokens <= row.slots  # type: ignore[operator]
        if row.method in ("visionzip", "prumerge-plus"):
            assert row.slots == int(0.8 * row.tokens)  # type: ignore[operator]
            # What is known of tokens is counted too, and weighs more in a model this small.
            assert row.slots / row.tokens <= row.ratio <= row.slots / row.tokens + 0.1  # type: ignore[operator]
    assert {cell.method for cell in cells} >= {"full", "random", "snapkv", "visionzip"}
    found = {(one.method, one.budget): one for one in aggregates(rows)}
    assert found["full", 1.0].loyalty.micro == 100 and found["full", 1.0].entries == pytest.approx(
        sum(row.tokens or 0 for row in full.values()) / len(full)
    )
    maps = {row.method: row for row in read_rows(tmp_path, MAPS, MapRow) if row.task == "vision-images"}
    for method in ("full", "snapkv", "visionzip"):
        one = maps[method]
        assert one.grid == list(seeing.grid) and one.vision is not None
        assert len(one.vision) % seeing.cells == 0 and len(one.survival) == len(one.tokens)
        held = [one.survival[i] for i in range(len(one.tokens)) if i not in one.vision]
        assert method == "snapkv" or set(held) == {1.0}
    zipped = maps["visionzip"]
    kept = sum(zipped.survival)
    assert kept == int(0.8 * len(zipped.tokens)) and 0 < sum(zipped.survival[i] for i in zipped.vision or ())


def test_with_the_question_in_sight(tmp_path: Path) -> None:
    model, seeing = of("qwen2-vl")
    evaluate(model, seeing, setup("vl-cache", "visionzip", tasks=("vision-count",), modes=("aware",)), tmp_path)
    rows = read_rows(tmp_path, ITEMS, ItemRow)
    assert not [row.error for row in rows if row.error] and {row.mode for row in rows} == {"aware"}
    assert all(len(row.replies) == 2 for row in rows)


def test_the_full_cache_says_what_transformers_own_does() -> None:
    """The noise floor of loyalty: the same replies, in any run and with another attention."""
    for name in ("qwen2-vl", "llava"):
        model, seeing = of(name)
        made = [tasks.get("vision-video").generate(seeing, 220, HELD_OUT + i) for i in range(2)]
        floor = noise_floor(model, seeing, [encode(seeing, item) for item in made])
        assert floor.again.micro == 100.0 and floor.plain.micro == 100.0 and floor.plain.n == 6


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path) -> None:
    model, seeing = of("llava")
    with pytest.raises(KeepKVError, match="one at a time"):
        Setup("tiny", ("vision-scene",), (), (0.5,), batch=2)
    with pytest.raises(KeepKVError, match="without any"):
        evaluate(model, seeing, setup("visionzip", tasks=("perplexity",)), tmp_path)
    with pytest.raises(KeepKVError, match="no options"):
        evaluate(model, seeing, _with_options(), tmp_path)
    small = setup("visionzip", budgets=(0.3,), tasks=("vision-images",))
    evaluate(model, seeing, small, tmp_path / "small")
    said = [row.error or "" for row in read_rows(tmp_path / "small", ITEMS, ItemRow) if row.method == "visionzip"]
    assert said and all("text all stay" in x for x in said)


def _with_options() -> Setup:
    return Setup("tiny", ("vision-scene",), (Variant("visionzip", {"count": 3}),), (0.5,), batch=1)
