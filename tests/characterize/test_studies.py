"""The three studies: machines for a load, a schedule on a trace, a search under a limit of time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from characterized import choice, grid, result

from keepkv.characterize.analyse.capacity import Load, capacity
from keepkv.characterize.analyse.pareto import axes_of
from keepkv.characterize.analyse.recommend import Limit
from keepkv.characterize.analyse.schedule import Setting, against_fixed, read_power, replay, settings
from keepkv.characterize.analyse.search import Space, proxy, search, survivors
from keepkv.characterize.grid.levels import Technique
from keepkv.characterize.workload.trace import Arrival
from keepkv.errors import KeepKVError

LOAD = Load(rate=10.0, tokens=1000.0, memory=1_000_000, weights=100_000)


def row(name: str, clients: int, goodput: float, token: float):
    return result(name, f"closed {clients}, 512 in", goodput_per_s=goodput, kv_bytes_per_token=token)


def test_memory_that_binds_makes_compression_save_machines() -> None:
    """800,000 bytes hold 4 requests of 1000 tokens at 200 bytes, and 16 at 50."""
    rows = [row("full", n, 0.5 * n, 200.0) for n in (1, 4, 16)] + [
        row("half @ 0.25", n, 0.5 * n, 50.0) for n in (1, 4, 16)
    ]
    best, full = capacity(rows, LOAD)
    assert (full.choice, full.fits, full.at_once, full.machines, full.bound) == ("full", 4, 4, 5, "memory")
    assert (best.choice, best.fits, best.at_once, best.machines, best.saves) == ("half @ 0.25", 16, 16, 2, 3)
    assert best.measured is rows[-1]


def test_computing_that_binds_is_not_helped() -> None:
    rows = [
        row(name, n, min(n, 2.0), token) for name, token in (("full", 50.0), ("half @ 0.5", 25.0)) for n in (1, 2, 8)
    ]
    for one in capacity(rows, LOAD):
        assert one.bound == "compute" and one.machines == 5 and one.saves == 0


def test_what_was_not_measured_is_not_promised() -> None:
    [edge] = capacity([row("full", 1, 0.5, 50.0)], LOAD)
    assert edge.bound == "edge of the grid" and edge.fits == 16 and edge.machines == 20
    [none] = capacity([row("full", 8, 4.0, 500.0)], LOAD)
    assert none.bound == "nothing fits" and none.machines is None and none.fits == 1
    with pytest.raises(KeepKVError, match="closed loops"):
        capacity([result("full", "poisson 2/s, 512 in", goodput_per_s=1.0)], LOAD)
    with pytest.raises(KeepKVError, match="bytes of a token"):
        capacity([row("full", 1, 1.0, 1.0).__class__(**{**row("full", 1, 1.0, 1.0).__dict__, "metrics": {}})], LOAD)
    with pytest.raises(KeepKVError, match="above 0"):
        Load(0.0, 1.0, 1, 0)


TABLE = [
    Setting("full", 1.0, 4.0, True, "x"), Setting("full", 4.0, 2.0, True, "x"),
    Setting("small", 1.0, 3.0, True, "x"), Setting("small", 4.0, 1.0, False, "x"),
]  # fmt: skip


def trace(*counts: int) -> list[Arrival]:
    """So many arrivals in each interval of 10 s."""
    return [Arrival(10.0 * i + 9.0 * k / max(1, n), None, 10) for i, n in enumerate(counts) for k in range(n)]


def test_a_schedule_takes_the_cheapest_that_is_feasible_at_each_load() -> None:
    schedule, *fixed = against_fixed(TABLE, trace(10, 40, 10), every=10.0, tokens=1.0)
    assert [step.choice for step in schedule.steps] == ["small", "full", "small"]
    assert schedule.joules == pytest.approx(10 * 10 * 3 + 40 * 10 * 2 + 10 * 10 * 3)
    assert (schedule.switches, schedule.unmet) == (2, 0)
    assert [one.name for one in fixed] == ["full", "small"]  # small takes less and leaves an interval unmet
    assert fixed[1].joules < schedule.joules < fixed[0].joules and fixed[1].unmet == 1


def test_hysteresis_keeps_a_setting_that_is_hardly_worse() -> None:
    near = [Setting("a", 1.0, 1.00, True, "x"), Setting("a", 4.0, 1.04, True, "x"),
            Setting("b", 1.0, 1.03, True, "x"), Setting("b", 4.0, 1.00, True, "x")]  # fmt: skip
    load = trace(10, 40, 10, 40)
    assert replay(near, load, every=10.0, tokens=1.0, hysteresis=0.1).switches == 0
    assert replay(near, load, every=10.0, tokens=1.0, hysteresis=0.0).switches == 3


def test_a_load_above_all_that_was_measured_is_unmet() -> None:
    found = replay(TABLE, trace(90), every=10.0, tokens=1.0)
    assert found.unmet == 1 and found.steps[0].choice == "full"


def test_settings_come_from_rows_or_from_a_file(tmp_path: Path) -> None:
    rows = [result("full", "poisson 1/s, 512 in", j_per_output_token=4.0, ttft_p95=0.2),
            result("small", "gamma 4/s cv 2, 512 in", j_per_output_token=1.0, ttft_p95=3.0),
            result("small", "closed 4, 512 in", j_per_output_token=9.0)]  # fmt: skip
    found = settings(rows, [Limit.read("ttft_p95<=1")])
    assert [(one.choice, one.rate, one.joules, one.feasible) for one in found] == [
        ("full", 1.0, 4.0, True),
        ("small", 4.0, 1.0, False),
    ]
    unmeasured = [replace(one, metrics={"ttft_p95": one.metrics.get("ttft_p95")}) for one in rows[:2]]
    with pytest.raises(KeepKVError, match="--power"):
        settings(unmeasured)
    file = tmp_path / "power.csv"
    file.write_text("choice,rate,j_per_output_token\nfull,1,7.5\nother,1,1\n")
    [one] = settings(unmeasured, power=read_power(file))
    assert (one.choice, one.joules, one.source) == ("full", 7.5, "power.csv")
    for text in ("choice,rate\nfull,1\n", "choice,rate,j_per_output_token\nfull,1,0\n", ""):
        file.write_text(text)
        with pytest.raises(KeepKVError, match=r"power\.csv"):
            read_power(file)


def measured(log: list):
    """Measures nothing: the best budget is 0.4, and short prompts say so roughly."""

    def act(asked, folder: Path, points):
        log.append((folder.name, [point.choice for point in points]))
        held = log_of.setdefault(folder.name, {})
        for point in points:
            b = point.technique.budget or 1.0
            score = 1.0 if b >= 0.4 else b
            one = choice(point.choice, 7, noise=0.001, ratio=b, tpot_p50=b, score=score)
            held[point.choice] = type(one)(
                replace(one.row, workload=point.workload.label, hardware=point.hardware.label), one.samples
            )
        return [*held.values()]

    log_of: dict[str, dict] = {}
    return act


def test_a_search_finds_a_planted_optimum_and_recommends_only_what_was_measured_in_full(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    axes = axes_of(["ratio", "score"])
    space, logs, found = Space((Technique("snapkv", 0.5),), 0.1, 0.9), ([], []), []
    for log in logs:
        found.append(
            search(
                grid(seeds=(0, 1)),
                space,
                tmp_path,
                axes,
                [Limit.read("score>=0.9")],
                seconds=600,
                trials=30,
                seed=3,
                measure=measured(log),
            )
        )
    assert found[0].best.pick is not None and found[0].best.pick.choice == "snapkv @ 0.4"
    assert found[0].best.pick.choice in found[0].survivors
    full = {name for folder, names in logs[0] if folder == tmp_path.name for name in names}
    assert full == {"full", *found[0].survivors}
    assert logs[0][-1][1] == ["full", *found[0].survivors] * 2  # in turn, once for each seed
    assert logs[0] == logs[1] and found[0].survivors == found[1].survivors  # the same seed asks the same


def test_a_search_that_measures_nothing_says_so(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = Space((Technique("snapkv", 0.5),))
    with pytest.raises(KeepKVError, match="give more time"):
        search(grid(), space, tmp_path, axes_of(["ratio"]), seconds=600, trials=3, measure=lambda *given: [])
    with pytest.raises(KeepKVError, match="needs methods"):
        Space(())


def test_the_proxy_is_a_quarter_and_survivors_are_of_the_front() -> None:
    short = proxy(grid())
    assert short.workloads[0].n_in.values == (128.0,) and short.phases.seconds == pytest.approx(0.05)
    some = [
        choice("a", 1, ratio=0.1, score=0.5),
        choice("b", 2, ratio=0.2, score=0.9),
        choice("c", 3, ratio=0.9, score=0.4),
    ]
    assert survivors(some, ["a", "b", "c"], axes_of(["ratio", "score"]), 2) == ["b", "a"]
