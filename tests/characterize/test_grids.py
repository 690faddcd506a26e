"""Grids: what is planned, what is dropped and why, and what tells points apart."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from characterized import APPLICATION, grid

from keepkv.characterize.grid.lengths import Lengths
from keepkv.characterize.grid.levels import Hardware, Point, Technique, Workload
from keepkv.characterize.grid.plan import plan
from keepkv.characterize.grid.possible import refusal
from keepkv.characterize.grid.quick import quick
from keepkv.characterize.grid.read import Grid, Phases, make_grid, read_grid
from keepkv.errors import KeepKVError

FILE = """
model: embedded
seeds: [0, 1]
applications:
  - {name: facts, tasks: [niah-single-1]}
  - {text: own.txt, questions: [{ask: "Where?", answer: here}]}
workloads:
  - {concurrency: [1, 4], n_in: 512}
  - {arrivals: gamma, rate: 2.0, cv: 3.0, n_in: {uniform: [256, 512]}, n_out: 8, turns: 2}
methods:
  - {method: snapkv, budget: [0.25, 0.5], codec: [none, int4], options: {window: 16}}
weights: [none, bf16]
hardware:
  - {device: cpu, threads: [1, 2]}
limits: {ttft: 1.0}
phases: {seconds: 5, requests: 10}
"""


def test_a_file_says_a_grid(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(FILE)
    made = read_grid(path)
    assert [one.label for one in made.techniques] == [
        "snapkv:window=16 @ 0.25", "snapkv:window=16,codec=int4 @ 0.25", "snapkv:window=16 @ 0.5",
        "snapkv:window=16,codec=int4 @ 0.5",
    ]  # fmt: skip
    assert [one.label for one in made.workloads] == [
        "closed 1, 512 in", "closed 4, 512 in", "gamma 2/s cv 3, uniform 256-512 in, 8 out, 2 turns",
    ]  # fmt: skip
    assert made.applications[1].text == str(tmp_path / "own.txt") and made.applications[1].questions == (
        ("Where?", "here"),
    )
    assert [one.threads for one in made.hardware] == [1, 2] and made.phases == Phases(seconds=5.0, requests=10)
    points = plan(made).points
    # applications × workloads × hardware × seeds, each with the full cache and methods × weights; and both ends.
    assert len(points) == 2 * 3 * 2 * 2 * (2 * 5 + 1) + 2  # nine others in two blocks, each with a baseline


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("aplications: []", "applications"),
        ("applications: [{tasks: [a], text: b}]", "either tasks or a text"),
        ("applications: [{tasks: [niah-single-1]}]\nworkloads: [{arrivals: poisson}]", "rate"),
        ("applications: [{tasks: [niah-single-1]}]\nworkloads: [{arrivals: often}]", "one of"),
        ("applications: [{tasks: [niah-single-1]}]\nmethods: [{method: snapkv}]", "needs a budget"),
        ("applications: [{tasks: [niah-single-1]}]\nmethods: [{method: snapkv, budget: -1}]", "budget"),
        ("applications: [{tasks: [niah-single-1]}]\nmethods: [{method: snapkv, budget: .5, cdec: int4}]", "codec"),
        ("applications: [{tasks: [niah-single-1]}]\nweights: [int3]", "weights"),
        ("applications: [{tasks: [niah-single-1]}]\nlimits: {ttf: 1}", "ttft"),
        ("applications: [{tasks: [niah-single-1]}]\nphases: {second: 1}", "seconds"),
        ("applications: [{tasks: [niah-single-1]}]\ndriver: somewhere", "in-process"),
        ("applications: [{name: a, tasks: [qa-1]}, {name: a, tasks: [qa-2]}]", "two applications are called 'a'"),
        ("applications: [{tasks: [qa-1]}]\nworkloads: [{n_in: 9}, {n_in: 9}]", "two workloads are called"),
        ("- a", "no set of names"),
        ("a: [", "not YAML"),
        ("seeds: [0]", "no applications"),
    ],
)
def test_what_is_no_grid_is_refused_with_the_remedy(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(KeepKVError, match=said):
        read_grid(path)


def test_each_block_has_the_full_cache_and_both_ends_are_the_same_baseline() -> None:
    made = plan(grid(block=1, seeds=(0, 1), workloads=(Workload(), Workload(concurrency=4))))
    start, *inner, end = made.points
    assert (start.role, end.role) == ("start", "end") and replace(end, role="start", block=0) == start
    blocks: dict[int, list[Point]] = {}
    for point in inner:
        blocks.setdefault(point.block, []).append(point)
    assert len(blocks) == 8 and all(
        sorted(one.role for one in held) == ["baseline", "point"] for held in blocks.values()
    )
    assert all(len({(one.place, one.seed) for one in held}) == 1 for held in blocks.values())
    assert [one.block for one in inner] == sorted(one.block for one in inner)


def test_the_order_is_random_and_the_same_for_the_same_seed() -> None:
    methods = tuple(Technique("snapkv", 0.1 * i) for i in range(1, 9))
    first, again, other = (plan(grid(techniques=methods, seed=seed)).points for seed in (0, 0, 1))
    assert first == again != other
    assert {one.choice for one in first} == {one.choice for one in other}


def test_what_cannot_run_is_dropped_with_the_reason() -> None:
    asked = grid(
        techniques=(Technique("snapkv", 0.5), Technique("snopkv", 0.5), Technique("snapkv", 0.25, {"windw": 3})),
        weights=("none", "torchao-int4", "checkpoint:/nowhere"),
        hardware=(Hardware(), Hardware("cpu", dtype="float16"), Hardware(power_cap=100.0), Hardware("cuda:99")),
        workloads=(Workload(), Workload(n_in=Lengths("fixed", (8000,)))),
    )
    made = plan(asked, partial(refusal, asked))
    assert {one.choice for one in made.points} == {"full", "snapkv @ 0.5"}
    assert {one.place for one in made.points} == {("facts", "closed 1, 512 in", "cpu, auto")}
    why = "\n".join({reason for _, reason in made.dropped})
    for said in ("snopkv", "windw", "torchao", "no model there", "emulated", "GPUs alone", "cuda:99", "4,096"):
        assert said in why, said


def test_somebody_elses_server_takes_no_methods() -> None:
    asked = grid(driver="http://127.0.0.1:9")
    made = plan(asked, partial(refusal, asked))
    assert {one.choice for one in made.points} == {"full"} and "somebody else" in made.dropped[0][1]


def test_a_digest_is_of_everything_that_decides_a_measurement() -> None:
    one, asked = Point(APPLICATION, Workload(), Technique("snapkv", 0.5), "none", Hardware()), grid()
    digest = one.digest(asked.setting())
    assert Point.from_dict(one.to_dict()) == one and Point.from_dict(one.to_dict()).digest(asked.setting()) == digest
    others = [
        replace(one, seed=1), replace(one, role="end"), replace(one, weights="bf16"), replace(one, block=1),
        replace(one, technique=Technique("snapkv", 0.25)), replace(one, workload=Workload(concurrency=2)),
        replace(one, hardware=Hardware(threads=1)), replace(one, application=replace(APPLICATION, plain=True)),
    ]  # fmt: skip
    digests = {digest, *(other.digest(asked.setting()) for other in others)}
    digests |= {one.digest(grid(limits={"ttft": 1.0}).setting()), one.digest(grid(phases=Phases()).setting())}
    assert len(digests) == len(others) + 3
    assert one.digest(grid(timeout=5.0).setting()) == digest  # how long one would wait decides nothing


def test_a_grid_comes_back_from_plain_data(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(FILE)
    for one in (read_grid(path), quick(), grid(driver="serve", seeds=(3,))):
        assert Grid.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_every_kind_of_workload_comes_back_from_plain_data() -> None:
    rich = Workload("gamma", rate=1.0, cv=2.0, n_in=Lengths("uniform", (5, 9)), n_out=Lengths(), shared=0.5, turns=3)
    app = replace(APPLICATION, tasks=(), text="a.txt", questions=(("a", "b"),))
    one = Point(app, rich, Technique("snapkv", 512, {"codec": "int4"}), "bf16", Hardware(power_cap=200.0))
    assert Point.from_dict(one.to_dict()) == one


def test_the_quick_profile_can_be_run_anywhere() -> None:
    asked = quick()
    made = plan(asked, partial(refusal, asked))
    assert not made.dropped and len(made.points) == 8


def test_the_grid_of_the_study_can_be_run_anywhere() -> None:
    asked = read_grid(Path(__file__).parents[2] / "benchmarks" / "characterization" / "grid.yaml")
    made = plan(asked, partial(refusal, asked))
    assert not made.dropped and len(made.points) == 44


def test_a_grid_of_plain_data_needs_no_folder() -> None:
    made = make_grid({"applications": [{"tasks": ["niah-single-1"]}]})
    assert made.techniques == (Technique(),) and made.applications[0].name == "niah-single-1"


def test_tasks_are_plain_english_but_for_the_embedded_model() -> None:
    held = {"applications": [{"tasks": ["notes"]}, {"name": "own", "text": "some.txt"}]}
    assert [one.plain for one in make_grid(held).applications] == [False, False]
    assert [one.plain for one in make_grid(held | {"model": "some/model"}).applications] == [True, False]
    held["applications"][0]["plain"] = False
    assert not any(one.plain for one in make_grid(held | {"model": "some/model"}).applications)
