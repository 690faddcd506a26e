"""``local-completions`` of lm-evaluation-harness against a server, beside keepkv's own model of the harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is in the extra lm-eval")
pytest.importorskip("tenacity", reason="local-completions needs lm-eval[api]")

from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from lm_eval_codes import answers, write
from serving_http import running

from keepkv.embedded import embedded_model
from keepkv.integrations.lm_eval import KeepKVLM

pytest_plugins = ["serving_http"]
pytestmark = pytest.mark.slow
SMALL = {"method": "streaming-llm", "budget": 0.2, "options": {"sinks": 4, "window": 8}}


@pytest.fixture(scope="module")
def folder(loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("lm_eval"), loaded[1])


def evaluate(folder: Path, model: Any, task: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found: dict[str, Any] = simple_evaluate(
        model=model, model_args=arguments, tasks=[task], task_manager=manager, bootstrap_iters=0, batch_size=1
    )
    return found


def over(url: str) -> dict[str, Any]:
    return {
        "base_url": f"{url}/v1/completions", "model": "keepkv-embedded", "tokenizer": embedded_model(),
        "tokenizer_backend": "huggingface", "max_length": 4096,
        "add_bos_token": True,  # as the harness's own models of this tokenizer have it
    }  # fmt: skip


def same(theirs: list[Any], ours: list[Any]) -> None:
    assert len(theirs) == len(ours)
    for left, right in zip(theirs, ours, strict=True):
        for (value, greedy), (reference, was_greedy) in zip(left, right, strict=True):
            assert value == pytest.approx(reference, abs=1e-3) and greedy == was_greedy


def mine(loaded: tuple[Any, Any], **options: Any) -> KeepKVLM:
    model, tokenizer = loaded
    return KeepKVLM(model, tokenizer=tokenizer, batch_size=1, **options)


def test_as_it_comes_with_the_full_cache(folder: Path, loaded: tuple[Any, Any]) -> None:
    with running(*loaded) as server:
        choice, written = (
            evaluate(folder, "local-completions", x, over(server.url)) for x in ("codes-choice", "codes-written")
        )
    ours = evaluate(folder, mine(loaded, method="full"), "codes-choice")
    assert choice["results"]["codes-choice"]["acc,none"] == ours["results"]["codes-choice"]["acc,none"] > 0.5
    same(answers(choice), answers(ours))
    said = evaluate(folder, mine(loaded, method="full"), "codes-written")
    assert answers(written) == answers(said)


def test_as_it_comes_where_the_server_compresses(folder: Path, loaded: tuple[Any, Any]) -> None:
    """Replies are those of the compressed cache; scores are refused, since nothing says where the document ends."""
    with running(*loaded, **SMALL) as server:
        written = evaluate(folder, "local-completions", "codes-written", over(server.url))
        with pytest.raises(Exception, match="400"):
            evaluate(folder, "local-completions", "codes-choice", {**over(server.url), "max_retries": 1})
    said = evaluate(folder, mine(loaded, method="streaming-llm", budget=0.2, sinks=4, window=8), "codes-written")
    assert answers(written) == answers(said)
    whole = evaluate(folder, mine(loaded, method="full"), "codes-written")
    assert answers(whole) != answers(said)


class Told(LocalCompletionsAPI):
    """The same, saying which tokens are the document: all of the context but its last."""

    def batch_loglikelihood_requests(self, chunks: Any) -> Any:
        inputs, lengths, keys = super().batch_loglikelihood_requests(chunks)
        self.known = {tuple(one): length for one, length in zip(inputs, lengths, strict=True)}
        return inputs, lengths, keys

    def _create_payload(self, messages: Any, generate: bool = False, **more: Any) -> dict[str, Any]:
        made: dict[str, Any] = super()._create_payload(messages, generate=generate, **more)
        return made | ({} if generate else {"keepkv": {"document": self.known[tuple(messages[0])] - 1}})


def test_scores_on_a_compressed_cache(folder: Path, loaded: tuple[Any, Any]) -> None:
    with running(*loaded, **SMALL) as server:
        choice = evaluate(folder, Told(**over(server.url)), "codes-choice")
    ours = evaluate(folder, mine(loaded, method="streaming-llm", budget=0.2, sinks=4, window=8), "codes-choice")
    same(answers(choice), answers(ours))
    assert choice["results"]["codes-choice"]["acc,none"] == ours["results"]["codes-choice"]["acc,none"] < 1
