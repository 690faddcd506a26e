"""Systems that take turns with each other at one point, each in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch

from keepkv.bench import hardware, roofline, sizes
from keepkv.bench.models import Model, Models
from keepkv.bench.plan import Point, Sweep
from keepkv.bench.protocol import WARM
from keepkv.bench.rows import BenchRow
from keepkv.bench.systems import PLAIN, PRESSES, System, slots_asked
from keepkv.core.plugins import imported
from keepkv.errors import KeepKVError
from keepkv.measure.environment import MadeWith, imports
from keepkv.measure.interval import Percentiles
from keepkv.measure.machine import machine
from keepkv.measure.session import RowFailed, Session
from keepkv.methods.base import METHODS
from keepkv.tasks.length import positions_of

MEASURED = ("prefill", "compression", "first", "decode", "energy")  # in each turn, or in those with a prefill
WORKER = Path(__file__).with_name("kvpress_worker.py")


@dataclass
class _Entry:
    """A system of a block, its process, and what it has answered."""

    system: System
    row: BenchRow
    session: Session | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)

    def fail(self, error: KeepKVError) -> None:
        self.row = replace(self.row, error=" ".join(str(error).split()))
        self.end()

    def end(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None


class Block:
    """The systems of one block at one point."""

    def __init__(self, sweep: Sweep, point: Point, models: Models, threads: int) -> None:
        self.sweep, self.point, self.threads = sweep, point, threads
        self.models = models
        self.bandwidths: list[tuple[float, float]] = []  # of a copy, and of reading

    def measure(self, block: tuple[System, ...]) -> list[BenchRow]:
        """A row for each system, in order."""
        entries = [_Entry(one, self._empty(one)) for one in block]
        try:
            device = hardware.open_device(self.point.device)
            model = self.models.get(self.point)
        except KeepKVError as error:
            for entry in entries:
                entry.fail(error)
            return [entry.row for entry in entries]
        with ExitStack() as stack:
            free = hardware.free_bytes(device)
            for entry in entries:
                stack.callback(entry.end)
                free = self._start(entry, model, device, free)
            for entry in entries:
                self._try(entry, self._loaded)
            for turn in range(self.sweep.repeats):
                if all(entry.session is None for entry in entries):
                    break
                self.bandwidths.append(hardware.bandwidths(device, self.threads, self.sweep.probe))
                for entry in entries:
                    self._try(entry, self._turn, turn < self.sweep.prefills)
        return [entry.row if entry.row.error else self._row(entry, entries) for entry in entries]

    def _empty(self, one: System) -> BenchRow:
        s, p = self.sweep, self.point
        made_with = MadeWith(model=str(p.model), device=p.device, dtype=s.dtype, versions={}, imports=imports())
        store = one.store and ":".join([one.store, *(f"{key}={x}" for key, x in one.store_options.items())])
        return BenchRow(
            kind="overhead" if p.overhead else "sweep", layers=None, label=one.label, library=one.library,
            method=one.method, options=one.spec()["options"], store=store, budget=one.budget, context=p.context,
            batch=p.batch, cap=None, hardware="", threads=self.threads, chunk=s.chunk, new=s.new, block=0,
            made_with=made_with,
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )  # fmt: skip

    def _start(self, entry: _Entry, model: Model, device: torch.device, free: int | None) -> int | None:
        """Starts the process of ``entry`` where it can be run; returns what then remains free."""
        one, sweep, point = entry.system, self.sweep, self.point
        try:
            text = model.text
            made_with = replace(entry.row.made_with, dtype=str(model.dtype)[6:])
            entry.row = replace(entry.row, layers=text.num_hidden_layers, hardware=machine(device), made_with=made_with)
            longest, new = positions_of(model), WARM + sweep.new
            if longest is not None and point.context + new > longest:
                raise RowFailed(f"{point.context} + {new} tokens: the model reads {longest} at most")
            batch = self._batch(entry, model, new)
            weights = roofline.weight_bytes(model.config, model.dtype, batch)
            entry.row = replace(entry.row, batch=batch, weight_bytes=weights)
            need = weights + self._held(one, model, new) * batch
            if free is not None and need > free:
                raise RowFailed(f"not enough memory: at least {need:,} bytes are needed, {free:,} are free")
            entry.session = self._open(one, model, batch, text.vocab_size)
            return None if free is None else free - need
        except KeepKVError as error:
            entry.fail(error)
            return free

    def _batch(self, entry: _Entry, model: Model, new: int) -> int:
        if self.point.batch is not None:
            return self.point.batch
        assert self.sweep.cap is not None
        geometry = sizes.Geometry.of(model.config, model.dtype)
        cap = sizes.read_cap(self.sweep.cap, geometry, self.point.context, new)
        entry.row = replace(entry.row, cap=cap)
        return sizes.largest_batch(cap, sizes.row_bytes(geometry, entry.system, self.point.context, new))

    def _held(self, one: System, model: Model, new: int) -> int:
        """Bytes of one row's cache, as far as arithmetic knows them."""
        if one.library == "keepkv":
            METHODS.factory(one.method)  # an unknown one is said before memory is
        try:
            geometry = sizes.Geometry.of(model.config, model.dtype)
            return sizes.row_bytes(geometry, one, self.point.context, new)
        except KeepKVError:
            return 0  # the check is then about the weights alone

    def _open(self, one: System, model: Model, batch: int, vocab: int) -> Session:
        sweep, context = self.sweep, self.point.context
        spec = one.spec() | {
            "model": model.path, "device": self.point.device, "dtype": str(model.dtype)[6:], "threads": self.threads,
            "context": context, "batch": batch, "new": sweep.new, "chunk": sweep.chunk, "seed": sweep.seed,
            "vocab": vocab, "imports": [str(one.path) for one in imported()],
        }  # fmt: skip
        if one.library != "kvpress":
            return Session([sys.executable, "-m", "keepkv.bench.worker"], spec)
        if sweep.kvpress_python is None:
            raise RowFailed("kvpress runs in an environment of its own: name its Python with --kvpress-python")
        if sweep.chunk is not None and sweep.chunk < context:
            raise RowFailed("kvpress 0.5.5 compresses wrongly where a prompt is read in chunks: leave out --chunk")
        spec |= {"press": PRESSES[one.method], "removed": 1 - slots_asked(one.budget, context) / context}
        return Session([sweep.kvpress_python, str(WORKER)], spec, alone=True)

    def _loaded(self, entry: _Entry) -> None:
        assert entry.session is not None
        versions = entry.session.answer()["versions"]
        entry.row = replace(entry.row, made_with=replace(entry.row.made_with, versions=versions))

    def _turn(self, entry: _Entry, fresh: bool) -> None:
        assert entry.session is not None
        entry.turns.append(entry.session.ask(fresh=fresh))
        if entry.turns[-1].get("compressed") is False and entry.system.method != "full":
            raise RowFailed("nothing was compressed: the tokens fit the budget, or no compression was due")

    def _try(self, entry: _Entry, act: Callable[..., None], *args: Any) -> None:
        if entry.session is not None:
            try:
                act(entry, *args)
            except KeepKVError as error:
                entry.fail(error)

    def _row(self, entry: _Entry, entries: list[_Entry]) -> BenchRow:
        turns, row = entry.turns, entry.row
        assert row.batch is not None and row.weight_bytes is not None
        weights, (bandwidth, reading) = row.weight_bytes, map(median, zip(*self.bandwidths, strict=True))
        floors = [roofline.seconds(weights, x["slot_bytes"], x["vote_bytes"], bandwidth) for x in turns]
        decode = [x["decode"] for x in turns]
        throughput = [row.batch / x for x in decode]
        plain = next((x for x in entries if x.system == PLAIN and not x.row.error), None)
        base = [(plain.row.batch or 1) / x["decode"] for x in plain.turns] if plain else []
        first, full = turns[0], turns[0]["full_bytes"] or self._plain_bytes(row)
        found: dict[str, Any] = {name: Percentiles.of([x.get(name) for x in turns]) for name in MEASURED}
        found |= {name: round(median(x[name] for x in turns)) for name in ("slot_bytes", "vote_bytes")}
        found |= {name: first.get(name) for name in ("slots", "merged", "dropped")}
        return replace(
            row,
            **found,
            throughput=Percentiles.of(throughput),
            speedup=Percentiles.of([a / b for a, b in zip(throughput, base, strict=True)]) if base else None,
            per_layer=Percentiles.of([x / (row.layers or 1) for x in decode]) if self.point.overhead else None,
            over_floor=Percentiles.of([x / least for x, least in zip(decode, floors, strict=True)]),
            floor=median(floors),
            bandwidth=bandwidth,
            read_bandwidth=reading,
            cache_bytes=first["bytes"],
            full_bytes=full,
            ratio=first["bytes"] / full if full else None,
            peak_bytes=first["peak"],
            base_bytes=first["base"],
            fits=None if row.cap is None else first["bytes"] <= row.cap,
        )

    def _plain_bytes(self, row: BenchRow) -> int | None:
        try:
            model = self.models.get(self.point)
            geometry = sizes.Geometry.of(model.config, model.dtype)
        except KeepKVError:
            return None
        return geometry.token * (self.point.context + WARM + self.sweep.new) * (row.batch or 1)
