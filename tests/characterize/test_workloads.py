"""Requests: how often they come, how long they are, and that the same seed makes the same ones."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path
from statistics import mean, stdev

import pytest
from transformers import AutoTokenizer

from keepkv.characterize.grid.lengths import Lengths
from keepkv.characterize.grid.levels import Application, Hardware, Point, Technique, Workload
from keepkv.characterize.workload.arrivals import gaps
from keepkv.characterize.workload.calls import Calls, follow
from keepkv.characterize.workload.graded import graded
from keepkv.characterize.workload.trace import Arrival, read_trace
from keepkv.embedded import embedded_model
from keepkv.errors import KeepKVError

N = 4000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.mark.parametrize(
    "workload", [Workload("poisson", rate=3.0), *(Workload("gamma", rate=3.0, cv=cv) for cv in (0.5, 1.0, 3.0))]
)
def test_rate_and_variation_of_gaps(workload: Workload) -> None:
    found = list(islice(gaps(workload, 0), N))
    assert mean(found) == pytest.approx(1 / 3, rel=4 * workload.cv / N**0.5)
    assert stdev(found) / mean(found) == pytest.approx(workload.cv, rel=0.15)
    assert found == list(islice(gaps(workload, 0), N)) != list(islice(gaps(workload, 1), N))


@pytest.mark.parametrize(
    ("given", "least", "most", "middle"),
    [
        (512, 512, 512, 512),
        ({"uniform": [100, 300]}, 100, 300, 200),
        ({"normal": [400, 30]}, 200, 600, 400),
        ({"mixture": {100: 3, 900: 1}}, 100, 900, 300),
        ({"lognormal": [400, 0.3]}, 50, 3000, 400 * 2.718281828 ** (0.3**2 / 2)),
    ],
)
def test_lengths(given: object, least: int, most: int, middle: float) -> None:
    one, rng = Lengths.read(given), random.Random(0)
    drawn = [one.draw(rng) for _ in range(N)]
    assert least <= min(drawn) and max(drawn) <= most
    assert mean(drawn) == pytest.approx(middle, rel=0.05)
    assert all(isinstance(x, int) for x in drawn)


@pytest.mark.parametrize("given", [0, -3, "many", {"uniform": [9, 3]}, {"zipf": [1]}, {"normal": [1]}, {"mixture": {}}])
def test_lengths_that_are_none(given: object) -> None:
    with pytest.raises(KeepKVError, match="lengths"):
        Lengths.read(given)


def test_traces_of_three_forms(tmp_path: Path) -> None:
    own, mooncake, azure = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.csv"
    own.write_text('{"at": 5, "n_in": 10, "n_out": 3}\n{"at": 4.5}\n')
    mooncake.write_text('{"timestamp": 1500, "input_length": 10, "output_length": 3, "hash_ids": [1]}\n')
    rows = ("2023-11-16 18:17:03.9799600,374,44", "2023-11-16 18:17:04.4799600,396,109")
    azure.write_text("\n".join(("TIMESTAMP,ContextTokens,GeneratedTokens", *rows)) + "\n")
    assert read_trace(own) == [Arrival(0.0), Arrival(0.5, 10, 3)]
    assert read_trace(mooncake) == [Arrival(0.0, 10, 3)]
    [first, second] = read_trace(azure)
    assert (first.n_in, second.n_out) == (374, 109) and second.at == pytest.approx(0.5)
    assert list(gaps(Workload("trace", trace=str(own), speed=2.0), 0)) == [0.0, 0.25]
    for text in ("", "not JSON\n", '{"when": 3}\n', "[1]\n"):
        own.write_text(text)
        with pytest.raises(KeepKVError, match="trace"):
            read_trace(own)


def calls(tokenizer, application: Application, **workload) -> Calls:
    return Calls(Point(application, Workload(**workload), Technique(), "none", Hardware()), tokenizer)


def test_requests_are_the_same_for_every_method_and_differ_by_number(tokenizer) -> None:
    app = Application("facts", tasks=("niah-single-1", "variable-tracking"))
    made = calls(tokenizer, app, n_in=Lengths("uniform", (150, 250)))
    other = Calls(Point(app, made.point.workload, Technique("snapkv", 0.5), "none", Hardware()), tokenizer)
    assert [made.turns(i) for i in range(4)] == [other.turns(i) for i in range(4)]
    assert [made.turns(i)[0].family for i in range(3)] == ["niah-single-1", "variable-tracking", "niah-single-1"]
    texts = {made.turns(i)[0].context for i in range(-3, 3)}
    assert len(texts) == 6  # those of the warm-up are others
    assert all(len(tokenizer.encode(text)) <= 250 for text in texts)


def test_a_shared_beginning_and_turns(tokenizer) -> None:
    app = Application("facts", tasks=("shared-context",))
    made = calls(tokenizer, app, n_in=Lengths("fixed", (400,)), shared=0.5, turns=2)
    first, second = made.turns(0)
    begin = first.context[:300]
    assert made.turns(1)[0].context.startswith(begin) and made.turns(1)[0].context != first.context
    later = follow(second, first, " seven")
    assert later.context == first.context + first.question.prompt + " seven" and later.turn == 1
    assert later.question != first.question


def test_own_text_with_questions_and_without(tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("The mill stands by the river. " * 60 + "The key is under the stone.")
    asked = Application("own", text=str(file), questions=(("Where is the mill?", "by the river"),))
    [call] = calls(tokenizer, asked, n_in=Lengths("fixed", (200,))).turns(0)
    assert call.graded and "Where is the mill?" in call.prompt
    assert graded(tokenizer, call, " It is by the river.\nNext").value == 1.0
    assert graded(tokenizer, call, " It is gone.").value == 0.0
    free = Application("free", text=str(file))
    [call] = calls(tokenizer, free, n_in=Lengths("fixed", (200,)), n_out=Lengths("fixed", (7,))).turns(0)
    assert not call.graded and call.limit == 7 and graded(tokenizer, call, "anything") is None


def test_a_trace_says_lengths(tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps({"at": i, "n_in": 150 + 100 * i, "n_out": 3 + i}) + "\n" for i in range(2)))
    made = calls(tokenizer, Application("facts", tasks=("niah-single-1",)), arrivals="trace", trace=str(file))
    short, long = made.turns(0)[0], made.turns(1)[0]
    assert (short.limit, long.limit) == (3, 4)
    assert len(tokenizer.encode(short.context)) <= 150 < len(tokenizer.encode(long.context)) <= 250
