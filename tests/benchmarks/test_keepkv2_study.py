"""The study of keepkv2: one tiny job from its folder to its tables, the pool, and the intervals."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.keepkv2 import run as study
from benchmarks.keepkv2.collect import collect, read, write
from benchmarks.keepkv2.plan import PARTS, Job, Model, Part, jobs
from benchmarks.keepkv2.pool import drain
from benchmarks.keepkv2.pooled import difference, mean, ratio
from benchmarks.keepkv2.tables import number, pages, smallest, table_of


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One job of scores and one of fidelity."""
    folder = tmp_path_factory.mktemp("study")
    (model,) = study.models(folder, ["embedded=embedded"])
    for name in ("agnostic", "fidelity"):
        part = Part(name, ("niah-multikey-1",), (1, 1), (0.2,), (256,), ("keydiff", "random"))
        job = Job(part, model, "niah-multikey-1", 256, 1)
        assert not study.finished(job, folder)
        study.run(job, folder)
        assert study.finished(job, folder)
    return folder


def test_a_job_ends_in_tables(work: Path, tmp_path: Path) -> None:
    write(tmp_path, *collect(work))
    cells, run = read(tmp_path)
    assert {cell["method"] for cell in cells} == {"full", "random", "snapkv", "keydiff"}
    assert not any(cell["failed"] for cell in cells)
    assert run["parts"]["agnostic"]["budgets"] == [0.2] and run["models"] == {"embedded": 0}
    made = pages(cells, run)
    assert set(made) == {"agnostic", "by-model", "by-task", "fidelity"}
    scores = table_of([cell for cell in cells if cell["part"] == "agnostic"], "score")
    assert f"| `full` | {number(mean(scores['full', 0.2]))} |" in made["agnostic"]


def test_the_full_cache_errs_nowhere(work: Path) -> None:
    cells = [cell for cell in collect(work)[0] if cell["part"] == "fidelity"]
    held = {cell["method"]: cell for cell in cells}
    for name in ("output_error", "kl", "answer_kl"):
        assert held["full"][name] == pytest.approx([0.0], abs=1e-5)
        assert held["random"][name][0] > held["keydiff"][name][0] > 0
    assert all(len(cell["layers"][0]) == 4 for cell in cells)


def test_difference_of_known_samples() -> None:
    """Differences of mean 0.1 and deviation 0.2 in each of 8 cells of 50: an interval of ±1.96·0.2/√400."""
    rng = torch.Generator().manual_seed(0)
    ours, theirs = {}, {}
    for key in range(8):
        hard = torch.randn(50, generator=rng) * 5  # of an item: pairing takes it out
        apart = torch.randn(50, generator=rng)
        apart = 0.1 + 0.2 * (apart - apart.mean()) / apart.std()
        theirs[key] = dict(enumerate(hard.tolist()))
        ours[key] = dict(enumerate((hard + apart).tolist()))
    found = difference(ours, theirs)
    assert found is not None
    assert found.value == pytest.approx(0.1, abs=1e-5)
    assert found.half == pytest.approx(1.96 * 0.2 / math.sqrt(400), rel=0.1)
    assert found.low < found.value < found.high
    assert difference(ours, ours) == difference(theirs, theirs)


def test_cells_weigh_the_same_and_pairs_are_of_both() -> None:
    ours = {"a": {1: 1.0, 2: 1.0, 3: 1.0}, "b": {1: 0.0, 2: 0.0}}
    assert mean(ours) == 0.5
    found = difference(ours, {"a": {2: 0.5, 3: 0.5, 9: 100.0}, "b": {1: 0.0, 2: 0.0}, "c": {1: 7.0}})
    assert found is not None and (found.value, found.low, found.high) == (0.25, 0.25, 0.25)
    half = ratio(ours, {"a": {1: 2.0, 2: 2.0, 3: 2.0}, "b": {1: 0.0, 2: 0.0}})
    assert half is not None and (half.value, half.low, half.high) == (0.5, 0.5, 0.5)
    assert difference(ours, {"d": {1: 1.0}}) is None
    alone = difference(ours, {"a": {1: 0.0, 2: 0.0}, "b": {2: 0.0}})
    assert alone is not None and alone.value == 0.5 and math.isnan(alone.half)


def test_intervals_of_small_cells_are_as_wide_as_they_should_be() -> None:
    """Of 40 cells of two items: their deviations, ±1 around the mean, have a standard error of 1 in each cell."""
    ours = {key: {0: 1.0, 1: -1.0} for key in range(40)}
    found = difference(ours, {key: {0: 0.0, 1: 0.0} for key in range(40)})
    assert found is not None and found.half == pytest.approx(1.96 / math.sqrt(40), rel=0.1)


def test_the_smallest_budget_that_is_enough() -> None:
    scores = {0.05: 0.99, 0.1: 0.9, 0.2: 0.96, 0.3: 1.0}
    found = {("x", budget): {"a": {0: score}} for budget, score in scores.items()}
    found |= {("full", budget): {"a": {0: 1.0}} for budget in scores}
    assert smallest(found, "x") == 0.2


@dataclass(frozen=True)
class Nap:
    where: str
    seconds: float


def nap(job: Nap) -> None:
    if job.where == "dies":
        os._exit(1)
    if job.where == "fails":
        raise ValueError("as told")
    time.sleep(job.seconds)


def test_the_pool_ends_in_time() -> None:
    told: list[str] = []
    began = time.monotonic()
    naps = [Nap("dies", 0), Nap("fails", 0), Nap("long", 60), Nap("stuck", 59), Nap("short", 0.1), Nap("last", 0.1)]
    done = drain(naps, nap, 2, 2.0, lambda job, done: 0.1 if job.where == "stuck" else job.seconds, told.append)
    assert time.monotonic() - began < 10
    assert {job.where for job in done} == {"short", "last"}
    ends = {where: next(line for line in told if f"{where}:" in line) for where in ("dies", "fails", "long", "stuck")}
    assert "its process died" in ends["dies"] and "as told" in ends["fails"]
    assert "not started" in ends["long"] and "stopped" in ends["stuck"]


def test_jobs_are_ordered_and_have_places_of_their_own() -> None:
    models = [Model("a", "a", 0), Model("b", "b", 1)]
    made = list(jobs(models))
    assert len({job.where for job in made}) == len(made)
    assert list(dict.fromkeys(job.part for job in made)) == list(PARTS)
    assert all(job.setup().seeds == (job.model.draw,) for job in made)
    with pytest.raises(SystemExit, match="no part nothing"):
        list(jobs(models, ["nothing"]))
