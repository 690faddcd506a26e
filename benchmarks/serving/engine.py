"""Throughput of the engine of ``keepkv serve``, and how soon a second question about a document is answered.

    python -m benchmarks.serving.engine --model MODEL --repeats 5

Every repeat runs all arms once, in random order, in one process, after one unmeasured round of each.

``generate``: requests one after the other by ``model.generate`` with a ``keepkv.Cache``, without the engine.
``engine``: closed loop, each of so many clients asks again as soon as it has its reply; ``exact`` as in the settings
of a server.
``context``: a document and a question in one request (first), and another question on the document as a context
(second), alone on the machine's model: seconds to the first token.
"""

from __future__ import annotations

import argparse
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.measure.environment import MadeWith
from keepkv.measure.interval import Percentiles
from keepkv.measure.ledger import Ledger
from keepkv.measure.rows import INLINE, Row
from keepkv.serve.engine import Engine
from keepkv.serve.request import Compression, Failed, Finished, Request, Sampling
from keepkv.serve.settings import Settings

RESULTS = Path(__file__).parent / "results"
METHOD, BUDGET = "snapkv", 0.25


@dataclass(frozen=True, kw_only=True)
class ServingRow(Row):
    """One arm of one repeat. clients: at once. seconds: of wall clock, cpu: of all threads of the process. tokens: of
    replies, in ``seconds``. first: seconds to the first token of each request, from its arrival; generate has none.
    threads: of torch. load: mean of the runnable processes of the machine over the last minute, when the arm ended."""

    arm: str
    clients: int
    repeat: int
    requests: int
    prompt: int
    reply: int
    method: str
    budget: float
    seconds: float
    cpu: float
    tokens: int
    first: list[float]
    threads: int
    load: float
    made_with: MadeWith = field(metadata=INLINE)


class Study:
    """The arms over one model. prompt, reply: tokens of each request."""

    def __init__(self, model: Any, tokenizer: Any, asked: argparse.Namespace) -> None:
        self.model, self.tokenizer, self.asked = model, tokenizer, asked
        self.made_with = MadeWith.of(model, asked.model)
        draw = random.Random(0)
        vocabulary = model.config.get_text_config().vocab_size
        self.texts = [
            tuple(draw.randrange(5, vocabulary) for _ in range(asked.prompt)) for _ in range(max(64, asked.requests))
        ]
        self.engines: dict[bool, Engine] = {}

    def engine(self, exact: bool) -> Engine:
        if exact not in self.engines:
            made = Engine(self.model, self.tokenizer, Settings(rows=16, chunk=self.asked.chunk, exact=exact, queue=256))
            made.start()
            self.engines[exact] = made
        return self.engines[exact]

    # --- arms: each returns tokens and seconds to the first of each request ------------------------------------------

    def generate(self, count: int) -> tuple[int, list[float]]:
        for text in self.texts[:count]:
            ids, reply = torch.tensor([text], device=self.model.device), self.asked.reply
            self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=reply, do_sample=False, eos_token_id=[],
                pad_token_id=0, **{CACHE: keepkv.Cache(self.model, METHOD, BUDGET)},
            )  # fmt: skip
        return count * self.asked.reply, []

    def clients(self, exact: bool, clients: int, count: int) -> tuple[int, list[float]]:
        engine, texts, lock = self.engine(exact), list(self.texts[:count]), threading.Lock()
        firsts: list[float] = []

        def client() -> None:
            while True:
                with lock:
                    if not texts:
                        return
                    text = texts.pop()
                end = self.ask(engine, Request(text, self.sampling(), Compression(METHOD, {}, BUDGET)))
                with lock:
                    firsts.append(_first(end))

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        return count * self.asked.reply, firsts

    def questions(self, count: int) -> tuple[int, list[float]]:
        """First and second question of ``count`` documents, in turn."""
        engine, firsts = self.engine(True), list[float]()
        for n, text in enumerate(self.texts[:count]):
            document = (text * (1 + self.asked.document // len(text)))[: self.asked.document]
            question, asked = text[:32], Compression(METHOD, {}, BUDGET)
            one = Request(document + question, Sampling(1, 0.0, ignore_eos=True), asked, split=len(document))
            firsts.append(_first(self.ask(engine, one)))
            name = f"doc{n}"
            engine.contexts.create(name, document, "", asked, replace=True).result()
            firsts.append(_first(self.ask(engine, Request(question, Sampling(1, 0.0, ignore_eos=True), context=name))))
            engine.contexts.delete(name)
        return 2 * count, firsts

    def sampling(self) -> Sampling:
        return Sampling(self.asked.reply, temperature=0.0, ignore_eos=True)

    def ask(self, engine: Engine, request: Request) -> Finished:
        *_, end = engine.submit(request)
        if isinstance(end, Failed) or not isinstance(end, Finished):
            raise SystemExit(f"a request failed: {end}")
        return end

    def arms(self) -> dict[tuple[str, int], Callable[[int], tuple[int, list[float]]]]:
        return {
            ("generate", 1): self.generate,
            **{("engine", n): lambda count, n=n: self.clients(True, n, count) for n in (1, 4, 16)},
            **{("engine, not exact", n): lambda count, n=n: self.clients(False, n, count) for n in (1, 16)},
            ("context", 1): lambda count: self.questions(max(1, count // 8)),
        }

    def measure(self, name: str, clients: int, repeat: int) -> ServingRow:
        run, asked = self.arms()[name, clients], self.asked
        before, cpu = time.perf_counter(), time.process_time()
        tokens, firsts = run(asked.requests)
        seconds, cpu = time.perf_counter() - before, time.process_time() - cpu
        return ServingRow(
            arm=name, clients=clients, repeat=repeat, requests=asked.requests, prompt=asked.prompt, reply=asked.reply,
            method=METHOD, budget=BUDGET, seconds=seconds, cpu=cpu, tokens=tokens, first=firsts,
            threads=torch.get_num_threads(), load=os.getloadavg()[0], made_with=self.made_with,
        )  # fmt: skip


def _first(end: Finished) -> float:
    assert end.times.first is not None
    return end.times.first - end.times.arrived


def table(rows: list[ServingRow]) -> str:
    """Medians over repeats, with 20th and 80th percentile, by wall clock and by processor time."""
    lines = ["| arm | clients | tokens/s | of a processor's second | first token, s |", "|---|---|---|---|---|"]
    arms = dict.fromkeys((row.arm, row.clients) for row in rows)
    for name, clients in arms:
        mine = [row for row in rows if (row.arm, row.clients) == (name, clients)]
        if name == "context":
            pairs = {
                which: [x for row in mine for x in row.first[at::2]] for which, at in (("first", 0), ("second", 1))
            }
            lines += [f"| {which} question | 1 | | | {said(values, 3)} |" for which, values in pairs.items()]
            continue
        wall, cpu = ([row.tokens / x(row) for row in mine] for x in (lambda r: r.seconds, lambda r: r.cpu))
        firsts = [x for row in mine for x in row.first]
        lines.append(f"| {name} | {clients} | {said(wall)} | {said(cpu)} | {said(firsts, 3) if firsts else ''} |")
    return "\n".join(lines)


def said(values: list[float], digits: int = 1) -> str:
    """Median, 20th and 80th percentile of ``values``, of which there is one at least."""
    found = Percentiles.of(values)
    assert found is not None
    return f"{found.median:.{digits}f} ({found.p20:.{digits}f}–{found.p80:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--reply", type=int, default=64)
    parser.add_argument("--document", type=int, default=3000)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--arms", nargs="*", help="of all arms only these, such as 'engine 16'")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    path = keepkv.embedded_model() if asked.model == "embedded" else asked.model
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    study = Study(model, AutoTokenizer.from_pretrained(path), asked)
    ledger = Ledger(asked.out / "engine.jsonl", ServingRow)
    asked.out.mkdir(parents=True, exist_ok=True)
    draw, arms = random.Random(0), [x for x in study.arms() if not asked.arms or f"{x[0]} {x[1]}" in asked.arms]
    for arm in arms:
        study.arms()[arm](2 if arm[0] == "generate" else arm[1])
    for repeat in range(asked.repeats):
        draw.shuffle(arms)
        for name, clients in arms:
            row = study.measure(name, clients, repeat)
            ledger.append([row])
            print(
                f"{name}, {clients}: {row.tokens / row.seconds:.1f} tokens/s, {row.cpu:.1f} s of processor", flush=True
            )
    for engine in study.engines.values():
        engine.stop()
    (asked.out / "engine.md").write_text(table(ledger.rows()) + "\n", encoding="utf-8")
    print(table(ledger.rows()))


if __name__ == "__main__":
    main()
