"""The adapter to lm-evaluation-harness: its own tasks and metrics, over a compressed cache, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is in the extra lm-eval")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval_codes import answers, write

import keepkv
from keepkv import tasks
from keepkv.embedded import embedded_model
from keepkv.engine.versions import CACHE
from keepkv.integrations.lm_eval import KeepKVLM


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = embedded_model()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def folder(loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents with four facts each, and two tasks on them."""
    return write(tmp_path_factory.mktemp("lm_eval"), loaded[1])


def evaluate(
    folder: Path, model: Any, arguments: str = "", task: str = "codes-choice", batch: int = 4
) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    out: dict[str, Any] = simple_evaluate(
        model=model,
        model_args=f"pretrained={embedded_model()},{arguments}" if isinstance(model, str) else None,
        tasks=[task],
        task_manager=manager,
        batch_size=batch,
        device="cpu",
        bootstrap_iters=0,
    )
    return out


@pytest.mark.parametrize("arguments", ["method=snapkv,budget=1.0", "method=full"])
def test_the_whole_budget_gives_the_numbers_of_hf(arguments: str, folder: Path) -> None:
    for task, metric in (("codes-choice", "acc,none"), ("codes-written", "exact_match,none")):
        plain, mine = (evaluate(folder, name, text, task) for name, text in (("hf", ""), ("keepkv", arguments)))
        assert mine["results"][task][metric] == plain["results"][task][metric] > 0.5
        if task == "codes-written":
            assert answers(mine) == answers(plain)
            continue
        for ours, theirs in zip(answers(mine), answers(plain), strict=True):
            for (value, greedy), (reference, was_greedy) in zip(ours, theirs, strict=True):
                assert value == pytest.approx(reference, abs=1e-4) and greedy == was_greedy


def test_a_small_budget_changes_the_numbers_and_says_so(folder: Path) -> None:
    found = evaluate(folder, "keepkv", "method=streaming-llm,budget=0.2,sinks=4,window=8")
    assert found["results"]["codes-choice"]["acc,none"] < 1
    done = found["config"]["keepkv"]
    assert done["requests"] == done["compressed"] == 24 and 0.15 < done["ratio"] < 0.25
    assert done["options"] == {"sinks": "4", "window": "8"} and done["budget"] == 0.2
    written = evaluate(folder, "keepkv", "method=streaming-llm,budget=0.2,sinks=4,window=8", "codes-written")
    assert written["results"]["codes-written"]["exact_match,none"] < 1
    assert written["config"]["keepkv"]["compressed"] == 6


def test_batches_change_nothing(folder: Path, loaded: tuple[Any, Any]) -> None:
    one, many = (evaluate(folder, "keepkv", "method=snapkv,budget=0.4,window=8,sinks=0", batch=n) for n in (1, 5))
    for left, right in zip(answers(one), answers(many), strict=True):
        for (value, greedy), (other, was_greedy) in zip(left, right, strict=True):
            assert value == pytest.approx(other, abs=1e-4) and greedy == was_greedy


def test_continuations_are_scored_on_the_compressed_cache(loaded: tuple[Any, Any]) -> None:
    """Beside a teacher-forced pass by hand, for a continuation of one token and one of several."""
    model, tokenizer = loaded
    context = tasks.get("niah-single-2").generate(tokenizer, 120, 3).context
    adapter = KeepKVLM(model, "knorm", 24, tokenizer=tokenizer, batch_size=2, sinks=0)
    pairs = [(context, " A"), (context, " and nothing else")]
    found = adapter.loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)
    plain = HFLM(model, tokenizer=tokenizer).loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    for (text, continuation), (value, _), (full, _) in zip(pairs, found, plain, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        said = tokenizer(continuation, return_tensors="pt", add_special_tokens=False).input_ids
        cache = keepkv.Cache(model, "knorm", 24, sinks=0)
        with torch.no_grad():
            model(ids[:, :-1], **{CACHE: cache})
            logits = model(torch.cat((ids[:, -1:], said[:, :-1]), 1), **{CACHE: cache}).logits.log_softmax(-1)
        assert value == pytest.approx(float(logits.gather(-1, said[..., None]).sum()), abs=1e-3)
        assert abs(value - full) > 1e-2


def test_nothing_compressed_is_an_error(folder: Path) -> None:
    with pytest.raises(keepkv.KeepKVError, match="nothing was compressed in 24 requests at budget=4096"):
        evaluate(folder, "keepkv", "method=knorm,budget=4096")
    with pytest.raises(keepkv.KeepKVError, match="nothing was compressed in 6 requests"):
        evaluate(folder, "keepkv", "method=knorm,budget=4096", "codes-written")


def test_short_contexts_and_whole_texts(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    half, whole = (KeepKVLM(model, "knorm", budget, tokenizer=tokenizer) for budget in (0.5, 1.0))
    texts = [SimpleNamespace(args=("", " The river")), SimpleNamespace(args=("A fox sleeps by the river", " now"))]
    assert len(half.loglikelihood(texts, disable_tqdm=True)) == 2 and half.done.compressed == half.done.requests == 1
    with pytest.raises(keepkv.KeepKVError, match="nothing was compressed in 1 requests"):
        half.loglikelihood(texts[:1], disable_tqdm=True)
    text = [SimpleNamespace(args=("The river is wide.",))]
    with pytest.raises(keepkv.KeepKVError, match="loglikelihood_rolling"):
        half.loglikelihood_rolling(text)
    assert whole.loglikelihood_rolling(text) == HFLM(model, tokenizer=tokenizer).loglikelihood_rolling(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("method=snapvk,budget=0.5", "Did you mean 'snapkv'"),
        ("method=snapkv", "needs a budget"),
        ("method=snapkv,budget=1.5", "budget=1.5"),
        ("method=snapkv,budget=nan", "budget=nan"),
        ("method=snapkv,budget=0.5,window=2.5", "window=2.5 is not a whole number"),
        ("method=snapkv,budget=0.5,when.every=x", "every='x' is not a whole number"),
        ("method=snapkv,budget=0.5,when.cap=x", "cap='x' is not a whole number"),
        ("method=random,budget=0.5,seed=x", "seed='x' is not a whole number"),
        ("method=snapkv,budget=0.5,when=deferred", r"when\.prefill=deferred"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_runs(arguments: str, message: str, folder: Path) -> None:
    with pytest.raises(keepkv.KeepKVError, match=message):
        evaluate(folder, "keepkv", arguments)


@pytest.mark.slow  # the harness reads its own thousands of tasks first
def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "keepkv.integrations.lm_eval", "run", "--model", "keepkv", "--device", "cpu"]
    command += ["--model_args", f"pretrained={embedded_model()},method=keydiff,budget=0.3", "--tasks", "codes-choice"]
    command += ["--include_path", str(folder), "--limit", "2", "--output_path", str(tmp_path / "out")]
    source = str(Path(keepkv.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    [written] = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(written.read_text("utf-8"))["config"]["keepkv"]["compressed"] == 8
