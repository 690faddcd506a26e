"""Twice as much as a server can do, for as long as is asked: nothing lost, mixed or stuck, and memory that stays flat.

    python -m benchmarks.serving.load --seconds 3600

``keepkv serve`` runs in a process of its own. Every request that can be answered is first sent once, alone; what it is
told under load must be the same text. Capacity is what sixteen clients that ask again as soon as they are answered get
through; after that requests arrive at random at ``--times`` that rate, whatever became of those before.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

from benchmarks.serving.mix import MODEL, Asked, misfit, pool
from keepkv.characterize.drive.server import Server
from keepkv.measure.environment import revision
from keepkv.measure.environment import versions as libraries
from keepkv.measure.ledger import Ledger
from keepkv.measure.rows import Row

RESULTS = Path(__file__).parent / "results"
PATIENCE = 180.0  # seconds that a request may take before it counts as stuck


@dataclass(frozen=True, kw_only=True)
class LoadRow(Row):
    """One run. capacity, rate: requests a second. ended: by kind of request and how it ended. same, other: replies that
    were, and were not, what was replied alone. slowest: seconds of a request that was answered. resident: MiB of the
    server at the start of the load and after each tenth of it. left: what the server still had when all was over; bytes
    beyond those of its contexts. code: the exit code of the server after SIGTERM."""

    seconds: float
    seed: int
    capacity: float
    rate: float
    ended: dict[str, dict[str, int]]
    same: int
    other: int
    slowest: float
    resident: list[float]
    left: dict[str, float]
    code: int
    versions: dict[str, str]
    revision: str | None


@dataclass
class Tally:
    ended: dict[str, Counter[str]] = field(default_factory=dict)
    same: int = 0
    other: int = 0
    slowest: float = 0.0

    def note(self, kind: str, how: str) -> None:
        self.ended.setdefault(kind, Counter())[how] += 1


class Load:
    """Requests to a server at ``url``. alone: what each was replied when nothing else ran."""

    def __init__(self, url: str, seed: int) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        self.web = httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits)
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
        self.draw = random.Random(seed)
        self.asked, self.contexts = pool(self.draw)
        self.alone: dict[Asked, tuple[str, ...]] = {}
        self.tally = Tally()
        self.made = 0

    async def prepare(self) -> None:
        for name, text in self.contexts.items():
            (await self.web.post("/v1/contexts", json={"name": name, "text": text})).raise_for_status()
        for one in self.asked:
            self.alone[one] = await self.reply(one)

    async def reply(self, one: Asked) -> tuple[str, ...]:
        body = one.body()
        extra = {"keepkv": body.pop("keepkv", {})}
        found: Any = await self.client.chat.completions.create(**body, stream=one.stream, extra_body=extra)
        if not one.stream:
            return tuple(choice.message.content for choice in found.choices)
        return ("".join([part.choices[0].delta.content or "" async for part in found if part.choices]),)

    async def one(self) -> str:
        """One request at random, noted, with how it ended."""
        kind = self.draw.choices(("asks", "leaves", "misfit", "context"), (80, 8, 8, 4))[0]
        one = self.draw.choice(self.asked)
        name = one.kind if kind == "asks" else kind
        started = time.monotonic()
        try:
            how = await getattr(self, f"_{kind}")(one)
        except (openai.APITimeoutError, httpx.TimeoutException):
            how = "stuck"
        except openai.APIStatusError as error:
            how = str(error.status_code)
        except (openai.APIConnectionError, httpx.HTTPError) as error:
            how = type(error).__name__
        if how == "answered":
            self.tally.slowest = max(self.tally.slowest, time.monotonic() - started)
        self.tally.note(name, how)
        return how

    async def _asks(self, one: Asked) -> str:
        if await self.reply(one) == self.alone[one]:
            self.tally.same += 1
        else:
            self.tally.other += 1
        return "answered"

    async def _leaves(self, one: Asked) -> str:
        async with self.web.stream("POST", "/v1/chat/completions", json={**one.body(), "stream": True}) as found:
            if found.status_code != 200:
                return str(found.status_code)
            async for _ in found.aiter_lines():
                return "left"
        return "answered"

    async def _misfit(self, one: Asked) -> str:
        found = await self.web.post(*(at := misfit(self.draw))[:1], content=at[1], headers=_JSON)
        return "refused" if 400 <= found.status_code < 500 and found.status_code != 429 else str(found.status_code)

    async def _context(self, one: Asked) -> str:
        """A context that is made, asked about and taken away."""
        self.made += 1
        name, text = f"own-{self.made}", self.draw.choice(list(self.contexts.values()))
        made = await self.web.post("/v1/contexts", json={"name": name, "text": text})
        if made.status_code != 201:
            return str(made.status_code)
        with contextlib.suppress(openai.RateLimitError):  # then it is taken away unasked
            await self.client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "And?"}], max_tokens=4,
                extra_body={"keepkv": {"context": name}},
            )  # fmt: skip
        gone = await self.web.delete(f"/v1/contexts/{name}")
        return "answered" if gone.status_code in (200, 204) else str(gone.status_code)

    async def capacity(self, seconds: float, clients: int = 16) -> float:
        """Requests a second of so many clients, each of which asks as soon as it is answered."""
        end = time.monotonic() + seconds

        async def client() -> int:
            count = 0
            while time.monotonic() < end:
                await self.one()
                count += 1
            return count

        started = time.monotonic()
        return sum(await asyncio.gather(*(client() for _ in range(clients)))) / (time.monotonic() - started)

    async def at(self, rate: float, seconds: float, process: int) -> list[float]:
        """Requests at random, ``rate`` a second; returns MiB of the server's process over time."""
        resident, started = [_resident(process)], time.monotonic()
        running: set[asyncio.Task[str]] = set()
        due = started
        while (now := time.monotonic()) < started + seconds:
            if now >= started + seconds * len(resident) / 10:
                resident.append(_resident(process))
                print(f"{now - started:.0f} s: {self.tally}, {resident[-1]:.0f} MiB", flush=True)
            due += self.draw.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(self.one())
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
        return [*resident, _resident(process)]

    async def left(self) -> dict[str, float]:
        """What the server has once nothing is asked of it."""
        end = time.monotonic() + PATIENCE
        while True:
            text = (await self.web.get("/metrics")).text
            now = {n: float(v) for n, v in re.findall(r"^keepkv_(\w+) (\S+)$", text, re.MULTILINE)}
            found = {name: now[name] for name in ("rows", "reading", "waiting")}
            found["bytes"] = now["reserved_bytes"] - now["context_bytes"]
            if not any(found.values()) or time.monotonic() > end:
                return found | {"contexts": now["contexts"] - len(self.contexts)}
            await asyncio.sleep(0.5)


_JSON = {"Content-Type": "application/json"}


def _resident(process: int) -> float:
    text = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024


async def run(asked: argparse.Namespace) -> LoadRow:
    words = ["--port", "{port}", "--memory", "1GiB", "--max-body", "1MiB", "--contexts"]
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(Server([sys.executable, "-m", "keepkv", "serve", *words, folder])) as server,
    ):
        load, process = Load(server.address, asked.seed), server.process
        await load.prepare()
        capacity = await load.capacity(asked.warm)
        load.tally = Tally()
        print(f"capacity: {capacity:.1f} requests a second", flush=True)
        resident = await load.at(asked.times * capacity, asked.seconds, process.pid)
        left = await load.left()
        process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(process.wait, PATIENCE)
        tally = load.tally
        return LoadRow(
            seconds=asked.seconds, seed=asked.seed, capacity=capacity, rate=asked.times * capacity,
            ended={kind: dict(ways) for kind, ways in sorted(tally.ended.items())}, same=tally.same, other=tally.other,
            slowest=tally.slowest, resident=resident, left=left, code=code, versions=libraries(), revision=revision(),
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600, help="of the load (default: 3600)")
    parser.add_argument("--warm", type=float, default=60, help="seconds in which the capacity is measured")
    parser.add_argument("--times", type=float, default=2, help="of the capacity (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "load.jsonl")
    asked = parser.parse_args()
    row = asyncio.run(run(asked))
    Ledger(asked.out, LoadRow).append([row])
    print(row)
    bad = {how for ways in row.ended.values() for how in ways} - {"answered", "left", "refused", "429"}
    if row.other or bad or any(row.left.values()) or row.code:
        raise SystemExit("something was lost, mixed, stuck or left: see the row")


if __name__ == "__main__":
    main()
