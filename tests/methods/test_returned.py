"""What a piece returns is refused by its name where it is wrong: never an error of the engine, never a silent NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from running import batch
from snippets import every_registry
from torch import Tensor

import keepkv
from keepkv.core.registry import owner
from keepkv.engine.versions import CACHE
from keepkv.errors import KeepKVError, NameTaken
from keepkv.reduce.base import REDUCTIONS
from keepkv.score.base import SCORES, FunctionScore, name_of
from keepkv.score.content.knorm import KNorm


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    with every_registry():
        yield


def compress(**pieces: Any) -> keepkv.Cache:
    model = zoo.model("llama")
    cache = keepkv.Cache(model, keepkv.Method(**pieces), budget=12)
    with torch.no_grad():
        model(**batch((31, 31)), **{CACHE: cache})
    return cache


def knorm(view: keepkv.LayerView) -> Tensor:
    return -view.slots.keys.float().norm(dim=-1)


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "rows and slots": (
        lambda view: knorm(view).amax(1),
        r"returned \(2, 31\) float32 on cpu: expected \(B,H,S\) ",
    ),
    "half": (lambda view: knorm(view).half(), r"returned \(2, \d+, 31\) float16 on cpu: expected .* float32 on cpu"),
    "device": (lambda view: knorm(view).to("meta"), "returned .* float32 on meta: expected .* on cpu"),
    "no tensor": (lambda view: 0.5, r"returned 0\.5: expected a tensor \(B,H,S\)"),
    "NaN": (lambda view: knorm(view) * float("nan"), r"returned NaN for \d+ of \d+ slots, whose keys and values"),
    "one NaN": (lambda view: knorm(view).index_fill(2, torch.tensor([5]), float("nan")), "returned NaN for"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_score_is_refused_by_its_name(case: str) -> None:
    """Before: "The size of tensor a (869) must match the size of tensor b (2)", and NaN without a word."""
    wrong, words = WRONG[case]
    keepkv.register_score("mine")(wrong)
    for score in (SCORES.build("mine"), FunctionScore(wrong)):
        with pytest.raises(KeepKVError, match=rf"score 'mine' {words}"):
            compress(score=score)


def test_nan_of_empty_slots_is_ignored() -> None:
    model = zoo.model("llama")
    score = FunctionScore(lambda view: knorm(view).masked_fill(~view.slots.valid, float("nan")))
    cache = keepkv.Cache(model, keepkv.Method(score), budget=12)
    with torch.no_grad():
        model(**batch((31, 20)), **{CACHE: cache})
    assert cache.report().compressed


def test_wrong_allocations_and_reductions_are_named() -> None:
    class Half(keepkv.Allocate):
        def __call__(self, scores: Tensor, view: keepkv.LayerView, budget: Tensor) -> Tensor:
            return budget[:, None].expand(scores.shape[:2]) / 2

    class Nothing(keepkv.Reduce):
        def __call__(self, view: Any, keep: Tensor, scores: Tensor, score: keepkv.Score) -> Any:
            return view.slots

    class Short(keepkv.Reduce):
        def __call__(self, view: Any, keep: Tensor, scores: Tensor, score: keepkv.Score) -> keepkv.Reduced:
            made = REDUCTIONS.build("keepkv")(view, keep, scores, score)
            return keepkv.Reduced(made.slots, made.merged.sum(0), made.dropped, made.lost)

    with pytest.raises(KeepKVError, match=r"allocation 'Half' returned .* float32 .*expected \(B,H\) = .* int64"):
        compress(score=KNorm(), allocate=Half())
    with pytest.raises(KeepKVError, match=r"reduction 'Nothing' returned Slots.*expected a keepkv\.Reduced"):
        compress(score=KNorm(), reduce=Nothing())
    with pytest.raises(KeepKVError, match=r"reduction 'Short' returned merged: .*expected \(B,H\)"):
        compress(score=KNorm(), reduce=Short())


def test_a_cell_that_is_run_again_takes_its_former_place() -> None:
    """Before: ValueError with the address of a lambda, on the second run of every notebook."""

    def cell(factor: float) -> None:
        @keepkv.register_score("mine")
        def mine(view: keepkv.LayerView) -> Tensor:
            return factor * knorm(view)

        @keepkv.register_score("mine-class")
        @dataclass(frozen=True)
        class Mine(keepkv.Score):
            size: float = factor

        @keepkv.register_method("mine", paper=str(factor))
        def method(sinks: int = 1) -> keepkv.Method:
            """Mine."""
            return keepkv.Method(SCORES.build("mine"))

    cell(1.0)
    cell(2.0)
    assert SCORES.build("mine-class").size == 2.0 and keepkv.method_info("mine").paper == "2.0"
    assert name_of(SCORES.build("mine")) == "mine" and name_of(SCORES.build("mine-class")) == "mine-class"
    compress(score=SCORES.build("mine"))


def test_the_name_of_another_needs_replace() -> None:
    def mine(view: keepkv.LayerView) -> Tensor:
        return knorm(view)

    with pytest.raises(NameTaken, match=r"score 'snapkv' is registered already, by keepkv\.score\.queries\."
                       r"snapkv\.SnapKV: give .*mine another name, or "
                       r"register it with replace=True") as caught:  # fmt: skip
        keepkv.register_score("snapkv")(mine)
    assert " at 0x" not in str(caught.value) and isinstance(caught.value, ValueError)
    keepkv.register_score("snapkv", replace=True)(mine)
    assert name_of(SCORES.build("snapkv")) == "snapkv" and isinstance(SCORES.build("snapkv"), FunctionScore)
    paper = keepkv.method_info("snapkv").paper
    with pytest.raises(NameTaken, match="method 'snapkv' is registered already"):
        keepkv.register_method("snapkv", paper="mine")(lambda: keepkv.Method(KNorm()))
    assert keepkv.method_info("snapkv").paper == paper  # a refused name leaves nothing behind


def test_owners_have_no_address() -> None:
    class Called:
        def __call__(self, view: Any) -> Any:
            return view

    assert owner(Called()).endswith("Called") and "0x" not in owner(Called()) + owner(lambda view: view)
