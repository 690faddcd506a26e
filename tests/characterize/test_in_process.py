"""The model in this process: what it answers is what evaluations answer, and a full budget is the full cache."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from keepkv.characterize.drive.base import Timeline
from keepkv.characterize.drive.inprocess import InProcess
from keepkv.characterize.drive.worker import Spec, measure
from keepkv.characterize.grid.lengths import Lengths
from keepkv.characterize.grid.levels import Application, Hardware, Point, Technique, Workload
from keepkv.characterize.grid.read import Grid, Phases
from keepkv.characterize.record.rows import RequestRow
from keepkv.characterize.record.samples import of_request, samples
from keepkv.characterize.workload.calls import Calls
from keepkv.characterize.workload.graded import graded
from keepkv.embedded import embedded_model
from keepkv.tasks import score_item
from keepkv.tasks.base import Item

WORK = Workload(concurrency=3, n_in=Lengths("uniform", (120, 200)))
APP = Application("facts", tasks=("niah-single-1", "variable-tracking"))
PHASES = Phases(warm_least=2, warm_most=2, seconds=0.1, requests=3, most_seconds=60.0, idle=0.0)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model())


def model():
    return AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()


def point(technique: Technique, work: Workload = WORK) -> Point:
    return Point(APP, work, technique, "none", Hardware(dtype="float32"))


def answered(tokenizer, technique: Technique, count: int = 4, rows: int = 3) -> list[Timeline]:
    async def act() -> list[Timeline]:
        driver = InProcess(model(), tokenizer, technique, rows)
        lines = [Timeline(call, time.perf_counter()) for i in range(count) for call in calls.turns(i)]
        await asyncio.gather(*(driver.send(line) for line in lines))
        assert driver.peak_bytes() is None or driver.peak_bytes() > 0
        await driver.close()
        return lines

    calls = Calls(point(technique), tokenizer)
    return asyncio.run(act())


@pytest.fixture(scope="module")
def full(tokenizer) -> list[Timeline]:
    return answered(tokenizer, Technique())


def test_replies_are_those_of_an_evaluation(tokenizer, full: list[Timeline]) -> None:
    plain = model()
    for line in full:
        assert line.error is None
        [score] = score_item(plain, tokenizer, Item(line.call.context, (line.call.question,)))
        mine = graded(tokenizer, line.call, line.text, line.tokens)
        assert (mine.value, mine.reply) == (score.value, score.reply)


def test_times_of_a_batch_are_in_order_and_the_full_cache_is_its_own_measure(full: list[Timeline]) -> None:
    for line in full:
        assert line.arrive <= line.admit < line.times[0] and line.times == sorted(line.times)
        assert line.end == line.times[-1] and len(line.times) == line.n_out <= line.call.limit
        assert line.kv["kv_bytes"] == line.kv["kv_full"] == line.kv["kv_logical"] and line.kv["compress_s"] == 0.0
    batches = [[line for line in full if line.admit == admit] for admit in sorted({line.admit for line in full})]
    assert len(batches) > 1 and max(map(len, batches)) <= 3
    for sooner, later in pairwise(batches):  # those that waited were begun when the others had ended
        assert max(line.end for line in sooner) <= later[0].admit


@pytest.mark.parametrize("method", ["snapkv", "keepkv", "adakv", "knorm", "streaming-llm"])
def test_a_budget_of_everything_is_the_full_cache_in_quality_and_bytes(
    tokenizer, full: list[Timeline], method: str
) -> None:
    # One at a time: a batch has padding, which a full cache holds and ours does not.
    for line, whole in zip(answered(tokenizer, Technique(method, 1.0), rows=1), full, strict=True):
        assert line.text == whole.text
        # Positions, votes and a slack for the next tokens are what a cache of keepkv has beside its slots.
        assert line.kv["kv_full"] <= line.kv["kv_logical"] <= 1.06 * line.kv["kv_full"]
        assert line.kv["kv_logical"] <= line.kv["kv_bytes"] <= 1.35 * line.kv["kv_full"]


def test_a_budget_is_kept_and_what_compressing_took_is_told(tokenizer, full: list[Timeline]) -> None:
    for line in answered(tokenizer, Technique("snapkv", 0.5)):
        assert line.kv["kv_bytes"] < 0.7 * line.kv["kv_full"] and line.kv["compress_s"] > 0
        assert line.kv["kv_logical"] <= line.kv["kv_bytes"]


def test_what_cannot_be_answered_fails_alone_and_the_driver_lives(tokenizer) -> None:
    async def act() -> list[Timeline]:
        driver = InProcess(model(), tokenizer, Technique("snapkv", 10_000_000), 1)
        calls = Calls(point(Technique()), tokenizer)
        bad = Timeline(calls.turns(0)[0], time.perf_counter())
        object.__setattr__(bad.call, "limit", None)
        good = Timeline(calls.turns(1)[0], time.perf_counter())
        await driver.send(bad)
        await driver.send(good)
        await driver.close()
        return [bad, good]

    bad, good = asyncio.run(act())
    assert bad.error is not None and bad.error.startswith("TypeError")
    assert good.error is None and good.end is not None


def test_a_worker_measures_a_point() -> None:
    asked = Grid((APP,), (WORK,), (Technique("snapkv", 0.5),), phases=PHASES, hardware=(Hardware(dtype="float32"),))
    found = measure(Spec(point(Technique("snapkv", 0.5)), "digest", asked.setting(), []))
    rows = [RequestRow.from_dict(one) for one in found["requests"]]
    steady = [row for row in rows if row.number >= 0]
    assert len(steady) >= PHASES.requests and all(row.status == "ok" for row in rows)
    assert all(row.arrive < 0 for row in rows if row.number < 0) and all(row.arrive >= 0 for row in steady)
    assert found["joules"] is None or found["energy_source"] != "none"
    assert found["state"]["load"] >= 0 and found["state"]["cores"] >= 1
    assert found["window_s"] > 0 and found["unstable"] is None and found["made_with"]["dtype"] == "float32"
    known = of_request(steady[0])
    for name in ("queue", "ttft", "service_ttft", "tpot", "e2e", "score", "ratio", "kv_bytes", "kv_logical_bytes",
                 "kv_bytes_per_token", "compress_s", "compress_share", "cached_share"):  # fmt: skip
        assert known[name] is not None, name
    assert samples([], {}, None) == {}


@pytest.mark.slow
def test_the_quick_profile_from_end_to_end(tmp_path) -> None:
    """All files, every column, energy n/a where nothing measures it, and the baseline's ratio exactly 1."""
    import csv

    from keepkv.characterize import characterize
    from keepkv.characterize.grid.quick import quick
    from keepkv.characterize.record.names import METRICS
    from keepkv.report.characterization import run_pages, write_pages

    began = time.perf_counter()
    found = characterize(quick(), tmp_path)
    write_pages(run_pages(tmp_path), tmp_path)
    assert time.perf_counter() - began < 300
    names = {
        "run.json",
        "points.jsonl",
        "points.csv",
        "requests.jsonl",
        "results.jsonl",
        "results.csv",
        "report.html",
        "report.md",
    }
    assert names <= {path.name for path in tmp_path.iterdir()}
    assert all(row.status == "ok" for row in found)
    bases = [row for row in found if row.technique == "full"]
    assert bases and all(row.value("ratio") == 1.0 for row in bases)
    with (tmp_path / "results.csv").open() as file:
        [*rows] = csv.DictReader(file)
    empty = {name for name in METRICS if all(row[name] == "" for row in rows)}
    energy = {name for name in METRICS if "j_per" in name or name in ("power_w", "energy_delay_js")}
    assert empty in (energy | {"leaked"}, {"leaked"})  # nothing is forbidden in its tasks


@pytest.mark.slow
def test_our_own_server_is_driven_and_tells_bytes() -> None:
    asked = Grid(
        (APP,), (WORK,), (Technique("snapkv", 0.5),), phases=PHASES, hardware=(Hardware(dtype="float32"),),
        driver="serve",
    )  # fmt: skip
    for technique in (Technique(), Technique("snapkv", 0.5)):
        found = measure(Spec(point(technique), "digest", asked.setting(), []))
        rows = [RequestRow.from_dict(one) for one in found["requests"]]
        assert all(row.status == "ok" and row.n_out and row.times for row in rows)
        ratios = {row.kv_bytes / row.kv_full for row in rows}
        assert ratios == {1.0} if technique.method == "full" else max(ratios) < 0.75
        assert found["peak_bytes"] and found["made_with"]["model"] == "embedded"
