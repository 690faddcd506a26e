"""Runs a sweep: a row for everything asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from keepkv.bench.block import Block
from keepkv.bench.models import Models
from keepkv.bench.plan import Sweep, at, blocks, points
from keepkv.bench.rows import BenchRow
from keepkv.measure.environment import revision

Step = Callable[[int, str], None]


def run(sweep: Sweep, step: Step = lambda rows, what: None) -> Iterator[BenchRow]:
    """Measures ``sweep`` and yields its rows in order; what cannot be measured has a row that says why.

    step: called with the number of rows finished and what comes next.
    """
    threads, commit = sweep.threads or torch.get_num_threads(), revision()
    with tempfile.TemporaryDirectory() as scratch:
        models = Models(Path(scratch), sweep)
        for point in points(sweep):
            for number, block in enumerate(blocks(at(point, sweep.systems), sweep.together)):
                step(0, "overhead" if point.overhead else f"{point.context} tokens")
                rows = Block(sweep, point, models, threads).measure(block)
                for row in rows:
                    yield replace(row, block=number, made_with=replace(row.made_with, revision=commit))
                step(len(block), "")
