"""Fidelity: nothing changes where nothing is compressed, and what is measured is what it says."""

from __future__ import annotations

import csv
import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner
from zoo import VOCAB, model

import keepkv
from keepkv.cli.program import program
from keepkv.core.when import When
from keepkv.embedded import embedded_model
from keepkv.engine.versions import CACHE
from keepkv.errors import KeepKVError, UnknownName
from keepkv.evaluation.fidelity import FidelityRow, fidelity
from keepkv.evaluation.fidelity.replay import record, replay
from keepkv.evaluation.fidelity.segments import cut, tokenise
from keepkv.measure.files import write
from keepkv.tasks.text import document

CONTEXT, LENGTH = 60, 80
METRICS = {"kl", "reverse_kl", "top1", "output_error", "prefix", "prefix_share", "first_token", "loyalty"}


def segments(n: int = 2) -> Tensor:
    return torch.randint(3, VOCAB, (n, LENGTH), generator=torch.Generator().manual_seed(1))


def measure(which: str, *methods: Any, budgets: Any = (0.5,), **options: Any) -> dict[tuple[str, Any], FidelityRow]:
    rows = fidelity(model(which), segments(), methods, budgets, context=CONTEXT, greedy=5, **options)
    return {(row.label, row.budget): row for row in rows}


def assert_unchanged(row: FidelityRow) -> None:
    found = {key: estimate.values for key, estimate in row.metrics.items()}
    assert all(set(found[key]) == {0.0} for key in ("kl", "reverse_kl", "output_error")), (row.label, found)
    assert all(set(found[key]) == {1.0} for key in ("top1", "prefix_share", "first_token", "loyalty")), row.label
    assert set(found["prefix"]) == {5.0} and all(set(one.values) == {0.0} for one in row.layers.values())


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4", "gpt-oss"])
def test_budget_of_everything_changes_nothing(name: str) -> None:
    rows = measure(name, "keepkv", "adakv", "h2o", budgets=(1.0,))
    assert [label for label, _ in rows] == ["full", "random", "snapkv", "keepkv", "adakv", "h2o"]
    for row in rows.values():
        assert_unchanged(row)


def test_latent_attention_is_replayed() -> None:
    rows = measure("deepseek-v3", budgets=(0.5, 1.0))
    assert_unchanged(rows["full", 1.0])
    assert_unchanged(rows["random", 1.0])
    assert 0 < rows["random", 0.5].metrics["output_error"].mean < 5


@pytest.mark.parametrize("name", ["llama", "gemma4"])
def test_less_budget_changes_more(name: str) -> None:
    rows = measure(name, "streaming-llm", budgets=(0.25, 0.9))
    for method in ("random", "streaming-llm"):
        little, much = rows[method, 0.25].metrics, rows[method, 0.9].metrics
        for key in ("kl", "reverse_kl", "output_error"):
            assert little[key].mean > much[key].mean > 0
        assert little["top1"].mean < 1
    assert_unchanged(rows["full", 1.0])


def test_a_row_says_what_it_was_made_with() -> None:
    options = {"key": "zip", "window": 8}
    row = measure("llama", ("keepkv", options), seed=3, name="a llama")["keepkv:key=zip,window=8", 0.5]
    assert (row.made_with.model, row.method, row.options, row.budget) == ("a llama", "keepkv", options, 0.5)
    assert (row.context, row.continuation, row.segments, row.greedy, row.seed) == (60, 20, 2, 5, 3)
    assert row.made_with.versions == {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "keepkv": keepkv.__version__,
    }
    assert (row.made_with.device, row.made_with.dtype) == ("cpu", "float32") and row.slots == 30
    assert row.ratio == pytest.approx(row.bytes / row.full_bytes) and 0.5 < row.ratio < 0.6
    assert row.made_with.revision is None or len(row.made_with.revision.removesuffix("-dirty")) == 40
    assert set(row.metrics) == METRICS and set(row.layers) == {0, 1, 2}
    for estimate in row.metrics.values():
        assert len(estimate.values) == 2 and estimate.low <= estimate.mean <= estimate.high
    assert row.metrics["output_error"].mean == pytest.approx(sum(x.mean for x in row.layers.values()) / 3)
    with pytest.raises(FrozenInstanceError):
        row.seed = 4  # type: ignore[misc]


def test_the_numbers_are_those_of_their_definitions() -> None:
    """Once more by hand: two caches, token by token, and plain float64 formulas."""
    llama, ids = model("llama"), segments(1)
    [_, row, *_] = fidelity(llama, ids, (), (0.5,), context=CONTEXT, greedy=5)
    assert row.label == "random"
    logs, replies = [], []
    for method in ("full", "random"):
        cache = keepkv.Cache(llama, method, 0.5)
        with torch.inference_mode():
            llama(input_ids=ids[:, :CONTEXT], **{CACHE: cache})
            cache.compressing = False
            reply, asked = ids[:, CONTEXT : CONTEXT + 1], cache.copy()
            for _ in range(5):
                logits = llama(input_ids=reply[:, -1:], **{CACHE: asked}).logits
                reply = torch.cat([reply, logits[:, -1:].argmax(-1)], 1)
            replies.append(reply[0, 1:].tolist())
            steps = [llama(input_ids=ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(CONTEXT, LENGTH)]
        logs.append(torch.cat(steps, 1)[0].double().log_softmax(-1))
    full, other = logs
    metrics = row.metrics
    assert metrics["kl"].mean == pytest.approx(float((full.exp() * (full - other)).sum(-1).mean()), rel=1e-4)
    assert metrics["reverse_kl"].mean == pytest.approx(float((other.exp() * (other - full)).sum(-1).mean()), rel=1e-4)
    assert metrics["top1"].mean == float((full.argmax(-1) == other.argmax(-1)).double().mean())
    same = [a == b for a, b in zip(*replies, strict=True)]
    assert metrics["prefix"].mean == (same + [False]).index(False) == 5 * metrics["prefix_share"].mean
    assert metrics["loyalty"].mean == float(all(same)) and metrics["first_token"].mean == float(same[0])


def test_output_error_is_that_of_attention_over_the_slots_that_are_left() -> None:
    """Against a float64 softmax over the true keys and values, each head with the slots it kept."""
    llama, ids = model("llama"), segments(1)
    full, small = keepkv.Cache(llama, "full"), keepkv.Cache(llama, "random", 0.5)
    with torch.inference_mode():
        for cache in (full, small):
            llama(input_ids=ids[:, :CONTEXT], **{CACHE: cache})
            cache.compressing = False
        twin = full.copy()
        calls = record(twin)
        llama(input_ids=ids[:, CONTEXT:], **{CACHE: twin})
        outputs = replay(small, calls)
    assert [call.index for call in calls] == [0, 1, 2] and small.get_seq_length() == CONTEXT
    for i, (call, found) in enumerate(zip(calls, outputs, strict=True)):
        part = next(next(iter(twin.layers[i].store.parts())).rectangles())
        keys, values = part.keys[0].double(), part.values[0].double()
        for head, position in ((0, 0), (1, 7), (3, 19)):
            kv = head // 2
            seen = torch.zeros(LENGTH, dtype=torch.bool)
            seen[small.kept_positions(i)[0, kv].long()] = True
            seen[CONTEXT : CONTEXT + position + 1] = True
            weights = (keys[kv, seen] @ call.query[0, head, position].double() * 16**-0.5).softmax(0)
            torch.testing.assert_close(found[0, position, head].double(), weights @ values[kv, seen], atol=1e-5, rtol=0)


def test_the_same_seed_gives_the_same_rows() -> None:
    one, two, other = (measure("llama", seed=seed)["random", 0.5] for seed in (0, 0, 1))
    assert one == two and one.metrics["kl"].values != other.metrics["kl"].values


@pytest.mark.parametrize(
    ("method", "budget"),
    [(("random", {"when": When(prefill=None)}), 0.5), ("snapkv", 500), ("keepkv", "512MiB")],
)
def test_a_method_that_compresses_nothing_is_refused(method: Any, budget: Any) -> None:
    with pytest.raises(KeepKVError, match="compressed nothing"):
        measure("llama", method, budgets=(budget,))


def test_deferred_compression_is_run_once_and_measured() -> None:
    options = {"window": 8}
    rows = list(
        measure("llama", ("snapkv", options), ("snapkv", options | {"when": When(prefill="deferred")})).values()
    )
    now, later = rows[-2:]
    assert later.slots == now.slots == 30
    assert later.metrics["kl"].mean == pytest.approx(now.metrics["kl"].mean, rel=1e-3)


def test_a_lossy_store_of_everything_is_a_row_of_its_own() -> None:
    plain, packed, *_ = measure("llama", ("full", {"store": "int8"})).values()
    assert_unchanged(plain)
    assert packed.label == "full:store=int8" and packed.slots == CONTEXT and packed.ratio < plain.ratio
    assert 0 < packed.metrics["output_error"].mean < 0.02 and 0 < packed.metrics["kl"].mean < 0.1


def test_a_selection_acts_on_the_tokens_that_follow() -> None:
    """Fed several at once, they would attend to everything: all selected is the full cache, one slot is not."""
    small = {"select_options": {"sinks": 1, "window": 1, "measure": 0}}
    every = ("full", {"select": "exact", "selected": 1.0, **small})
    plain, all_, one, *_ = measure("llama", every, ("full", {"select": "exact", "selected": 1, **small})).values()
    assert all_.label == "full:select=exact,selected=1.0,select.sinks=1,select.window=1,select.measure=0"
    assert all_.metrics["kl"].mean == pytest.approx(0, abs=1e-5) and all_.metrics["loyalty"].mean == 1
    assert one.metrics["kl"].mean > 1e-4 and one.metrics["output_error"].mean == plain.metrics["output_error"].mean


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(UnknownName, match="snapvk"):
        measure("llama", "snapvk")
    for wrong in ({"context": LENGTH}, {"context": 0}, {"context": CONTEXT, "greedy": 0}):
        with pytest.raises(KeepKVError):
            fidelity(model("llama"), segments(), **wrong)
    with pytest.raises(KeepKVError, match="2048"):
        fidelity(model("llama"), segments().repeat(1, 30), context=CONTEXT)
    with pytest.raises(KeepKVError, match="budget"):
        fidelity(model("llama"), segments(), (), (), context=CONTEXT)


def test_segments_are_spread_over_the_text() -> None:
    ids = torch.arange(100)
    assert cut(ids, 3, 10)[:, 0].tolist() == [0, 45, 90]
    assert cut(ids, 10, 10).flatten().tolist() == list(range(100))
    assert cut(ids, 2, 11, start=7)[:, :2].tolist() == [[7, 0], [7, 90]]
    for wrong, words in (((11, 10), "need 110"), ((0, 10), "at least one")):
        with pytest.raises(KeepKVError, match=words):
            cut(ids, *wrong)


def test_rows_are_written_whole(tmp_path: Path) -> None:
    rows = list(measure("llama", ("random", {"when": When(every=4)})).values())
    lines, table = write(rows, tmp_path, "fidelity")
    read = [json.loads(line) for line in lines.read_text("utf-8").splitlines()]
    assert [one["metrics"]["kl"]["mean"] for one in read] == [row.metrics["kl"].mean for row in rows]
    assert read[-1]["options"] == {"when": {"prefill": "immediate", "every": 4, "cap": None}}
    with table.open(newline="", encoding="utf-8") as file:
        columns = list(csv.DictReader(file))
    assert [float(one["kl_high"]) for one in columns] == [row.metrics["kl"].high for row in rows]
    assert float(columns[1]["output_error_layer_2"]) == rows[1].layers[2].mean


@pytest.fixture(scope="module")
def embedded() -> Any:
    path = embedded_model()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def test_random_is_worse_than_full_on_the_embedded_model(embedded: Any) -> None:
    network, tokenizer = embedded
    ids, start = tokenise(tokenizer, document())
    assert start == tokenizer.bos_token_id and start not in ids
    full, random, plain = fidelity(network, cut(ids, 2, 256, start), (), (0.2,), context=192, greedy=4)
    assert set(full.metrics["kl"].values) == {0.0} and full.metrics["loyalty"].mean == 1.0
    for row in (random, plain):
        assert min(row.metrics["kl"].values) > 0 and min(row.metrics["output_error"].values) > 0.01
        assert row.ratio < 0.25 and row.metrics["top1"].mean <= 1.0


def run(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(program, ["fidelity", *args])
    assert result.exit_code == code, (result.output, result.exception)
    return result


SMALL = ("--segments", "2", "--context", "96", "--continue", "16", "--greedy", "2", "--method", "knorm", "-b", "0.5")


def test_the_verb_measures_the_shipped_document(tmp_path: Path) -> None:
    rows = json.loads(run(*SMALL, "--out", str(tmp_path), "--json").stdout)
    assert [row["method"] for row in rows] == ["full", "random", "snapkv", "knorm"]
    assert all(row["model"] == "embedded" and row["context"] == 96 and row["continuation"] == 16 for row in rows)
    assert rows == [json.loads(line) for line in (tmp_path / "fidelity.jsonl").read_text("utf-8").splitlines()]
    assert (tmp_path / "fidelity.csv").is_file()


def test_the_verb_prints_a_table(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(document()[:2000], encoding="utf-8")
    shown = run(*SMALL, "--text", str(text), "--segments", "1").stdout
    assert "budget 0.5" in shown and "knorm" in shown and "1 segments, 96 tokens" in shown
    assert "Examples:" in run("--help").stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--method", "snapvk"), ["snapvk", "Did you mean 'snapkv'"]),
        (("--budget", "lots"), ["lots", "256MiB"]),
        (("--text", "/nowhere/text.txt"), ["/nowhere/text.txt", "No such file"]),
        (("--model", "/nowhere/model"), ["/nowhere/model"]),
        (("--out", "/dev/null/results"), ["/dev/null/results", "write"]),
        (("--segments", "500"), ["the text has", "fewer or shorter"]),
        (("--budget", "4000", "--method", "random"), ["compressed nothing"]),
        (("--context", "4000"), ["need", "tokens"]),
    ],
)
def test_one_line_and_code_2(args: tuple[str, ...], words: list[str]) -> None:
    result = run(*args, code=2)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert all(word in result.stderr for word in words), result.stderr
