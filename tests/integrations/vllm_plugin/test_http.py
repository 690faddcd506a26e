"""A server that `keepkv serve` starts, asked by the ``openai`` client: budgets, streams, refusals, receipts."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.integrations.vllm.wish import wish_of
from keepkv.tasks import demo_document

MINUTES = 6
DEFAULT = {"method": "snapkv", "budget": 0.5}


@dataclass
class Server:
    url: str
    log: Path

    def read(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as answer:
            return str(answer.read().decode())


@pytest.fixture(scope="module")
def server(vllm_here: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    words = [
        "serve",
        keepkv.embedded_model(),
        "--engine",
        "vllm",
        "-m",
        "snapkv",
        "-b",
        "0.5",
        "--",
        "--port",
        str(port),
    ]
    words += ["--host", "127.0.0.1", "--max-model-len", "2048", "--dtype", "float32", "--enforce-eager"]
    words += ["--block-size", "32", "--kv-cache-memory-bytes", str(64 << 20)]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as out:
        running = subprocess.Popen(
            [sys.executable, "-m", "keepkv", *words], stdout=out, stderr=out, env=env, start_new_session=True
        )
    made = Server(f"http://127.0.0.1:{port}", log)
    try:
        _wait(made, running)
        yield made
    finally:
        running.terminate()
        running.wait(60)


def _wait(server: Server, running: Any) -> None:
    end = time.monotonic() + 60 * MINUTES
    while time.monotonic() < end and running.poll() is None:
        try:
            server.read("/health")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    raise AssertionError("the server did not start:\n" + server.log.read_text()[-3000:])


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


PROMPT = demo_document()[0][:3000] + demo_document()[1][0].prompt


def complete(client: Any, stream: bool = False, **keys: Any) -> str:
    asked: dict[str, Any] = {"ignore_eos": True}
    if keys:
        asked["vllm_xargs"] = {f"keepkv_{name}": x for name, x in keys.items()}
    found = client.completions.create(
        model=keepkv.embedded_model(), prompt=PROMPT, max_tokens=24, temperature=0, stream=stream, extra_body=asked
    )
    return "".join(one.choices[0].text for one in found) if stream else str(found.choices[0].text)


def expected(prompt: str = PROMPT, tokens: int = 24, **keys: Any) -> str:
    path = keepkv.embedded_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    wish = wish_of({f"keepkv_{name}": x for name, x in keys.items()}, DEFAULT)
    kept = {} if wish is None else {CACHE: keepkv.Cache(model, wish.method, wish.budget)}
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None, **kept)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize(
    "keys",
    [{}, {"budget": 1.0}, {"budget": "0.3"}, {"method": "keepkv2", "budget": 0.3},
     {"method": "adakv", "budget": "128", "every": 8}, {"method": "keepkv", "budget": 0.2, "threshold": 0.5}],
    ids=lambda keys: " ".join(map(str, keys.values())) or "default",
)  # fmt: skip
def test_replies_are_those_of_keepkv(client: Any, keys: dict[str, Any]) -> None:
    assert complete(client, **keys) == complete(client, stream=True, **keys) == expected(**keys)


@pytest.mark.parametrize(
    ("keys", "said"),
    [({"budget": "1GiB"}, "bytes belong to the server"), ({"method": "snapk"}, "Did you mean 'snapkv'"),
     ({"budget": 8}, "Give at least 36"), ({"method": "kvzip"}, "Use 'keepkv2'"), ({"oops": 1}, "keepkv_oops"),
     ({"method": "snapkv", "every": 0}, "every")],
)  # fmt: skip
def test_refusals_are_answered_with_400(client: Any, keys: dict[str, Any], said: str) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="keepkv") as refused:
        complete(client, **keys)
    assert said in refused.value.message
    assert complete(client, budget=1.0) == expected(budget=1.0), "the server goes on"


WRITTEN = """\
task: facts-{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 8, do_sample: false, ignore_eos: true{more}}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.mark.parametrize(
    ("name", "keys"), [("default", {}), ("whole", {"budget": 1.0}), ("tenth", {"method": "keepkv2", "budget": 0.1})]
)
def test_lm_eval_asks_it(server: Server, tmp_path: Path, name: str, keys: dict[str, Any]) -> None:
    """Its ``local-completions``, with the server's default and with budgets of the task."""
    evaluator = pytest.importorskip("lm_eval", reason="lm-eval[api] is not installed here")
    path, context, asked = keepkv.embedded_model(), demo_document()[0][:2500], demo_document()[1][:4]
    rows = [{"text": context + one.prompt, "answer": one.answer} for one in asked]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    extra = json.dumps({f"keepkv_{key}": x for key, x in keys.items()})
    more = f", vllm_xargs: {extra}" if keys else ""
    (tmp_path / "task.yaml").write_text(WRITTEN.format(name=name, data=tmp_path / "rows.jsonl", more=more))
    found = evaluator.simple_evaluate(
        model="local-completions",
        model_args={
            "model": path, "tokenizer": path, "tokenizer_backend": "huggingface", "max_retries": 1,
            "base_url": f"{server.url}/v1/completions", "num_concurrent": 2,
        },
        tasks=[f"facts-{name}"], bootstrap_iters=0,
        task_manager=evaluator.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
    )  # fmt: skip
    [samples] = found["samples"].values()
    said = {one["doc"]["text"]: one["resps"][0][0] for one in samples}
    assert [said[row["text"]] for row in rows] == [expected(row["text"], 8, **keys).split("\n\n")[0] for row in rows]


def test_what_was_done_is_counted_and_logged(server: Server, client: Any) -> None:
    before = counters(server)
    complete(client, budget=0.25)
    complete(client, budget=1.0)  # a step later the one before is known to have ended
    after = counters(server)
    assert after["requests"] == before["requests"] + 1
    assert after["compressions"] == before["compressions"] + 1
    assert after["blocks_given_back"] > before["blocks_given_back"]
    assert after["slots_dropped"] > before["slots_dropped"]
    assert "snapkv at 25% of the tokens: 1 compression" in server.log.read_text()


def counters(server: Server) -> dict[str, float]:
    lines = [x.split() for x in server.read("/metrics").splitlines() if x.startswith("keepkv:")]
    return {name.removeprefix("keepkv:").removesuffix("_total"): float(x) for name, x in lines}
