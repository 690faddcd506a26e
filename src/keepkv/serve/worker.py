"""The thread that runs the model: it admits, reads prompts in pieces, and decodes rows between them."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator

import torch

from keepkv.errors import Busy, Stopped, TooLarge
from keepkv.serve.admission import Ledger
from keepkv.serve.batch.decode import Decoder
from keepkv.serve.batch.job import Job, bytes_of
from keepkv.serve.batch.row import Row
from keepkv.serve.contexts.shelf import Shelf

LOG = logging.getLogger("keepkv.serve")
OFTEN = 0.25  # seconds between two looks at what a cache really holds


class Worker:
    """Takes jobs from any thread and runs them in one of its own.

    Between two decoded tokens of the rows one piece of one prompt is read, of each prompt in turn. Jobs are admitted in
    the order in which they came, as soon as the bytes that they need are left; nobody overtakes.
    """

    def __init__(self, decoder: Decoder, shelf: Shelf, *, memory: int, rows: int, queue: int) -> None:
        self.decoder, self.shelf, self.rows, self.queue = decoder, shelf, rows, queue
        self.ledger = Ledger(memory, lambda: shelf.held[1])
        self.waiting: deque[Job] = deque()
        self.reading: deque[tuple[Job, Iterator[None]]] = deque()
        self.decoding: list[Row] = []
        self.finished, self.seconds = Counter[str](), defaultdict[str, float](float)
        self.counts = Counter[str]()  # prompt, cached and completion tokens, steps, rows decoded
        self._weighed: dict[Job, tuple[float, int]] = {}
        self.state = "starting"
        self._turn, self._deadline, self._looked = threading.Condition(), float("inf"), 0.0
        self._thread = threading.Thread(target=self._run, name="keepkv-serve", daemon=True)

    # --- for any thread ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        self.state = "running"
        self._thread.start()

    def add(self, job: Job) -> None:
        """Raises ``Busy`` where as many wait as may, ``Stopped`` where no more are taken."""
        with self._turn:
            if self.state != "running":
                raise Stopped(f"the server is {self.state} and takes nothing new")
            # One that can begin at once does not wait for anything.
            if len(self.waiting) >= self.queue and not (self._begins(job) and not self.waiting):
                raise Busy(
                    f"{len(self.waiting)} requests wait and no more may (queue={self.queue}), and "
                    f"{self.ledger.reserved:,} of {self.ledger.limit:,} bytes are taken: try again later",
                    len(self.waiting),
                    self.queue,
                )
            self.waiting.append(job)
            self._turn.notify()

    @property
    def measured(self) -> int:
        """Bytes that caches held when each was last looked at, contexts included."""
        return sum(size for _, size in list(self._weighed.values())) + self.shelf.held[1]

    def stop(self, grace: float) -> None:
        """End what was taken, in ``grace`` seconds at most, cancel the rest, and end the thread."""
        with self._turn:
            if self.state == "running":
                self.state = "stopping"
            self._deadline = time.monotonic() + grace
            self._turn.notify()
        if self._thread.is_alive():
            self._thread.join()
        self.state = "stopped"

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait():
                try:
                    self._admit()
                    self._drop_cancelled()
                    self._read()
                    self._decode()
                    self._look()
                except Exception as error:  # of the server, not of one job: all that run end by it, and it goes on
                    LOG.exception("the worker failed: what was taken ends, and it goes on")
                    self._end_all(error)
            self._end_all(None)

    def _wait(self) -> bool:
        """Until there is something to do; False: the end."""
        before = time.perf_counter()
        with self._turn:
            while not (self.waiting or self.reading or self.decoding) and self.state == "running":
                self._turn.wait()
            busy = bool(self.waiting or self.reading or self.decoding)
        self.seconds["idle"] += time.perf_counter() - before
        return self.state == "running" or (busy and time.monotonic() < self._deadline)

    def _begins(self, job: Job) -> bool:
        """Whether ``job`` could begin now."""
        return len(self.reading) + len(self.decoding) < self.rows and self.ledger.fits(job.need)

    def _admit(self) -> None:
        while self.waiting:
            with self._turn:
                job = self.waiting[0]
                if not job.cancelled and not self._begins(job):
                    self._make_room(job.need)
                    if not self._begins(job):
                        if self.reading or self.decoding:
                            return
                        self.waiting.popleft()
                        job.fail(self._never(job))
                        continue
                self.waiting.popleft()
                if not job.cancelled:
                    self.ledger.reserve(job, job.need)
                    self.reading.append((job, job.turns()))
            if job.cancelled:
                job.cancel()

    def _make_room(self, need: int) -> None:
        """Of the memory of contexts, which are on the disk too."""
        if not self.ledger.fits(need):
            others = self.ledger.reserved - self.shelf.held[1]
            self.shelf.trim(most=max(0, self.ledger.limit - others - need))

    def _never(self, job: Job) -> TooLarge:
        """Nothing runs, and ``job`` does not fit: what is taken is taken by contexts that have no file."""
        left = self.ledger.limit - self.ledger.reserved
        return TooLarge(f"this needs {job.need:,} bytes, and contexts leave {left:,}: delete some", job.need, left)

    def _drop_cancelled(self) -> None:
        for job, _ in [x for x in self.reading if x[0].cancelled]:
            self._done(job)
            job.cancel()
        for row in [x for x in self.decoding if x.cancelled]:
            row.cancel()
            self._done(row)
        with self._turn:
            gone = [job for job in self.waiting if job.cancelled]
            for job in gone:
                self.waiting.remove(job)
        for job in gone:
            job.cancel()

    def _read(self) -> None:
        """One piece of the prompt whose turn it is."""
        if not self.reading:
            return
        before = time.perf_counter()
        job, turns = self.reading[0]
        try:
            next(turns)
            self.reading.rotate(-1)
        except StopIteration:
            self._done(job)
            if isinstance(job, Row) and job.running:
                self.decoding.append(job)
                self.ledger.reserve(job, self._weigh(job) + job.growth)
        except Exception as error:
            self._done(job)
            job.fail(error)
        self.seconds["read"] += time.perf_counter() - before

    def _decode(self) -> None:
        """The next token of every row."""
        rows = [row for row in self.decoding if row.cache is not None and row.token is not None]
        if not rows:
            return
        before = time.perf_counter()
        caches, tokens = [row.cache for row in rows if row.cache], [row.token for row in rows if row.token is not None]
        for row, found in zip(rows, self.decoder.step(caches, tokens), strict=True):
            if isinstance(found, Exception):
                row.fail(found)
            else:
                try:
                    row.take(*found)
                except Exception as error:
                    row.fail(error)
        for row in rows:
            if not row.running:
                self._done(row)
        self.counts["steps"] += 1
        self.counts["decoded"] += len(rows)
        self.seconds["decode"] += time.perf_counter() - before

    def _done(self, job: Job) -> None:
        """``job`` holds nothing any more, or holds it elsewhere."""
        self.ledger.reserve(job, 0)
        self._weighed.pop(job, None)
        self.reading = deque(x for x in self.reading if x[0] is not job)
        self.decoding = [x for x in self.decoding if x is not job]

    def _end_all(self, error: Exception | None) -> None:
        """Of all that was taken, cancelled or by ``error``."""
        with self._turn:
            jobs = [*self.decoding, *(job for job, _ in self.reading), *self.waiting]
            self.waiting.clear()
        for job in jobs:
            self._done(job)
            if error is None:
                job.cancel()
            else:
                job.fail(error)

    def _look(self) -> None:
        """At what one of the caches holds now: looking takes milliseconds, so each has its turn."""
        now = time.monotonic()
        if now - self._looked > OFTEN:
            self._looked = now
            jobs: list[Job] = [*self.decoding, *(job for job, _ in self.reading)]
            if jobs:
                self._weigh(min(jobs, key=lambda job: self._weighed.get(job, (0.0, 0))[0]))

    def _weigh(self, job: Job) -> int:
        """Bytes that the cache of ``job`` holds; noted with the time."""
        self._weighed[job] = time.monotonic(), bytes_of(job.held())
        return self._weighed[job][1]
