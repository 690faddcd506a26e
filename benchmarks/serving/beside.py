"""``keepkv serve`` beside ``transformers serve``, on the same model, asked the same things by the same client.

    OMP_NUM_THREADS=2 .venv/bin/python -m benchmarks.serving.beside --repeats 5

Both are processes of their own that stay up; one is asked at a time, in random order in every repeat. Clients stream
replies of so many tokens to chat requests, each again as soon as it is answered. transformers with and without its
continuous batching; keepkv with every token of the document, and with a quarter of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.serving.engine import said
from benchmarks.serving.mix import MODEL, part
from keepkv.characterize.drive.server import Server
from keepkv.embedded import CHAT_TEMPLATE, embedded_model
from keepkv.measure.environment import revision
from keepkv.measure.environment import versions as libraries
from keepkv.measure.ledger import Ledger
from keepkv.measure.rows import Row

RESULTS = Path(__file__).parent / "results"
OURS: dict[str, dict[str, Any] | None] = {
    "keepkv serve": None,
    "keepkv serve, snapkv 25 %": {"method": "snapkv", "budget": 0.25},
    "keepkv serve, keepkv2 25 %": {"method": "keepkv2", "budget": 0.25},
}
THEIRS = {"transformers serve": [], "transformers serve, continuous batching": ["--continuous-batching"]}


@dataclass(frozen=True, kw_only=True)
class BesideRow(Row):
    """One arm of one repeat. tokens: of all replies. first: seconds to the first token of each request."""

    arm: str
    clients: int
    repeat: int
    requests: int
    words: int
    reply: int
    seconds: float
    tokens: int
    first: list[float]
    threads: int
    load: float
    versions: dict[str, str]
    revision: str | None


async def ask(url: str, model: str, document: str, asked: argparse.Namespace, ours: Any) -> tuple[int, float]:
    """Tokens of a reply and seconds to the first of them."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        started, first, tokens = time.perf_counter(), None, 0
        parts = await client.chat.completions.create(
            model=model, temperature=0.0, max_tokens=asked.reply, stream=True,
            messages=[{"role": "system", "content": document}, {"role": "user", "content": "What is in it?"}],
            extra_body={"keepkv": ours} if ours else None, stream_options={"include_usage": True},
        )  # fmt: skip
        async for part in parts:
            if part.choices and part.choices[0].delta.content:
                first = first if first is not None else time.perf_counter() - started
            if part.usage is not None:
                tokens = part.usage.completion_tokens
        return tokens, first if first is not None else time.perf_counter() - started


async def loop(clients: int, url: str, model: str, texts: list[str], asked: argparse.Namespace, ours: Any) -> Any:
    """``clients`` that ask about ``texts`` in turn, until all were asked."""
    left, found = list(texts), list[tuple[int, float]]()

    async def client() -> None:
        while left:
            found.append(await ask(url, model, left.pop(), asked, ours))

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


def saved(folder: str) -> str:
    """The embedded model with a chat template, as transformers serves a folder."""
    path = embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=150, help="of each document")
    parser.add_argument("--reply", type=int, default=48, help="tokens")
    parser.add_argument("--requests", type=int, default=32, help="of an arm in a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "beside.jsonl")
    asked = parser.parse_args()
    draw = random.Random(0)
    texts = [part(draw, asked.words) for _ in range(asked.requests)]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = saved(folder)
        commands = {"keepkv": [sys.executable, "-m", "keepkv", "serve", model, "--name", MODEL, "--port", "{port}"]}
        theirs = [
            str(Path(sys.executable).parent / "transformers"),
            "serve",
            model,
            "--device",
            "cpu",
            "--port",
            "{port}",
        ]
        commands |= {arm: [*theirs, *more] for arm, more in THEIRS.items()}
        at = {one: stack.enter_context(contextlib.closing(Server(words))).address for one, words in commands.items()}
        arms: dict[str, tuple[str, str, Any]] = {arm: (at["keepkv"], MODEL, how) for arm, how in OURS.items()}
        arms |= {arm: (at[arm], model, None) for arm in THEIRS}
        order, ledger = [(arm, clients) for arm in arms for clients in (1, 16)], Ledger(asked.out, BesideRow)
        for repeat in range(-1, asked.repeats):  # one round that is not measured
            for arm, clients in random.Random(repeat).sample(order, len(order)):
                url, model_name, how = arms[arm]
                few = texts if repeat >= 0 else texts[:clients]
                before = time.perf_counter()
                found = asyncio.run(loop(clients, url, model_name, few, asked, how))
                seconds = time.perf_counter() - before
                row = BesideRow(
                    arm=arm, clients=clients, repeat=repeat, requests=len(few), words=asked.words, reply=asked.reply,
                    seconds=seconds, tokens=sum(n for n, _ in found), first=[first for _, first in found],
                    threads=torch.get_num_threads(), load=os.getloadavg()[0],
                    versions=libraries(), revision=revision(),
                )  # fmt: skip
                print(f"{repeat} {arm}, {clients}: {row.tokens / seconds:.1f} tokens/s", flush=True)
                if repeat >= 0:
                    ledger.append([row])
    print(table(ledger.rows()))


def table(rows: list[BesideRow]) -> str:
    """Medians over repeats, 20th and 80th percentile."""
    lines = ["| server | threads | clients | tokens/s | first token, s |", "|---|---|---|---|---|"]
    for arm, threads, clients in sorted({_arm(row) for row in rows}, key=lambda x: (x[1], x[2], x[0])):
        mine = [row for row in rows if _arm(row) == (arm, threads, clients)]
        speed, first = said([row.tokens / row.seconds for row in mine]), said([x for row in mine for x in row.first], 2)
        lines.append(f"| {arm} | {threads} | {clients} | {speed} | {first} |")
    return "\n".join(lines)


def _arm(row: BesideRow) -> tuple[str, int, int]:
    return row.arm, row.threads, row.clients


if __name__ == "__main__":
    main()
