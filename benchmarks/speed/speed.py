"""What a decoded token, a prompt and a cache cost: every sweep behind docs/speed.md, in one command.

    python -m benchmarks.speed.speed                                            # all parts, hours on two cores
    python -m benchmarks.speed.speed --kvpress-python ../kvpress-environment/bin/python
    python -m benchmarks.speed.speed --parts flat cap --threads 2
    python -m benchmarks.speed.speed --quick --out /tmp/speed                   # the same on a toy, to see that it runs
    python -m benchmarks.speed.speed --again                                    # what is made of the rows in --out

Run it on a machine that does nothing else. Each part writes PART.jsonl, PART.csv and pictures to ``--out``; speed.md is
made of all parts that lie there. A row that cannot be measured says why, and the command then exits with 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers.utils import logging

from keepkv.bench.plan import Sweep, by_budget, total
from keepkv.bench.plots import draw, name_of, need_matplotlib
from keepkv.bench.rows import BenchRow
from keepkv.bench.run import run
from keepkv.bench.shapes import Shape
from keepkv.bench.systems import System, peers
from keepkv.cli.arguments import variant
from keepkv.cli.output import progress_rows
from keepkv.measure import Percentiles
from keepkv.measure.files import read_file, write

# 1.1 GB of float32 weights: at the 20 to 40 GB/s of two cores a token takes more than 20 ms whatever the cache, so that
# Python's share is small; the same with a quarter of the KV heads; a cache that outweighs 0.15 GB of weights from 2.4k
# tokens on; and one whose prompts are read in seconds.
WIDE = Shape.read("layers=4,hidden=2048,heads=32,kv_heads=32,head_dim=64,intermediate=5632,vocab=32000")
GROUPED = replace(WIDE, kv_heads=8)
HEAVY = Shape.read("layers=8,hidden=512,heads=16,kv_heads=16,head_dim=64,intermediate=1408,vocab=8000")
QUICK = Shape.read("layers=4,hidden=1024,heads=16,kv_heads=16,head_dim=64,intermediate=2816,vocab=32000")
TOY = Shape.read("layers=2,hidden=64,heads=4,kv_heads=4,head_dim=16,vocab=256")
NAMES = {str(WIDE): "wide", str(GROUPED): "grouped", str(HEAVY): "heavy", str(QUICK): "quick"}
MIB = 1 << 20


@dataclass(frozen=True)
class Part:
    """One sweep. about: what it shows. ours, peers, stores: as the command line takes them; the rest as ``Sweep``."""

    name: str
    about: str
    ours: tuple[str, ...]
    peers: tuple[str, ...]
    budgets: tuple[float | int, ...]
    contexts: tuple[int, ...]
    stores: tuple[str | None, ...] = (None,)
    shapes: tuple[Shape, ...] = (WIDE,)
    cap: str | None = None
    chunk: int | None = None
    new: int = 32
    repeats: int = 7
    prefills: int = 1
    overhead: bool = False
    together: int = 16  # all of a part take turns

    def sweep(self, a: argparse.Namespace) -> Sweep:
        """With what the command line says; a toy where it says ``--quick``."""
        budgets: list[float | int | str] = list(self.budgets)
        named = [System("keepkv", one.method, budget, one.options, store)
                 for one in map(variant, self.ours) for store in self.stores for budget in budgets]  # fmt: skip
        peer = [one for one in peers(list(self.peers), budgets) if one.library != "kvpress" or a.kvpress_python]
        sweep = Sweep(
            self.shapes, by_budget([*named, *peer]), self.contexts, cap=self.cap, devices=(a.device,),
            dtype=a.dtype, new=self.new, repeats=self.repeats, prefills=self.prefills, chunk=self.chunk,
            threads=a.threads, overhead=self.overhead, together=self.together, kvpress_python=a.kvpress_python,
        )  # fmt: skip
        if not a.quick:
            return sweep
        slim = tuple(one if not isinstance(one.budget, int) else replace(one, budget=64) for one in sweep.systems)
        small = {"contexts": (256,), "chunk": self.chunk and 64, "new": 2, "repeats": 2, "probe": MIB}
        return replace(sweep, models=(TOY,), systems=slim, **small)


MERGE_ALL = ("keepkv:score=snapkv,threshold=none", "keepkv:threshold=none")
PARTS = (
    Part("decode", "A decoded token after 8k tokens, 10 % of the slots: eviction, merging by the same score, peers; "
         "and what Python costs.", ("snapkv", "keydiff", *MERGE_ALL), ("plain", "kvpress:snapkv"), (0.1,), (8192,),
         shapes=(WIDE,), overhead=True, together=4),
    Part("heads", "Budgets by head on the same model: slots that are freed, whatever head they were in.",
         ("snapkv", "adakv"), ("plain",), (0.1,), (8192,), shapes=(WIDE,)),
    Part("grouped", "A quarter of the KV heads.", ("snapkv", MERGE_ALL[1]), ("plain",), (0.1,), (8192,),
         shapes=(GROUPED,)),
    Part("heavy", "Where the cache outweighs the weights: 16k tokens, 10 % of the slots, equal heads and heads that "
         "differ; kvpress frees the slots of the first and masks those of the second.",
         ("snapkv", "adakv", MERGE_ALL[1]), ("plain", "kvpress:snapkv", "kvpress:adakv"), (0.1,), (16384,),
         shapes=(HEAVY,), together=6),
    Part("packed", "Fewer bytes for each number: 8k tokens.", ("full", "snapkv"), ("plain", "fp8", "quanto-4"), (0.1,),
         (8192,), (None, "int8"), (HEAVY,)),
    Part("flat", "A decoded token at 1024 slots, from 4k to 64k tokens seen, read in chunks of 1024.",
         ("streaming-llm", MERGE_ALL[1]), (), (1024,), (4096, 8192, 16384, 32768, 65536), shapes=(HEAVY,), chunk=1024,
         new=64),
    Part("prefill", "Reading a prompt, and what compressing it adds.",
         ("streaming-llm", "keydiff", "snapkv", "h2o", "expected-attention", "adakv", "keepkv", MERGE_ALL[1]),
         ("plain", "kvpress:keydiff", "kvpress:snapkv", "kvpress:expected-attention", "kvpress:adakv"),
         (0.1,), (8192,), new=4, repeats=5, prefills=5, shapes=(QUICK,)),
    Part("longer", "The same for 16k tokens.", ("snapkv", "keepkv"), ("plain", "kvpress:snapkv"), (0.1,), (16384,),
         new=4, repeats=3, prefills=3, shapes=(QUICK,)),
    Part("cap", "The largest batch in the memory that the plain cache takes at batch 2: prompts of 4k tokens.",
         ("snapkv", MERGE_ALL[1]), ("plain", "fp8", "kvpress:snapkv"), (0.2, 0.1), (4096,), shapes=(QUICK,),
         cap="plain@2", repeats=5),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=[part.name for part in PARTS], help="only these")
    parser.add_argument("--kvpress-python", help="of the environment of kvpress; its rows are left out without it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="a toy: shows that everything runs, and measures nothing")
    parser.add_argument("--again", action="store_true", help="measures nothing: what is made of the rows in --out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    a = parser.parse_args()
    if a.quick and a.out == parser.get_default("out"):
        parser.error("--quick measures nothing that belongs among the results: give --out")
    need_matplotlib()
    logging.disable_progress_bar()
    a.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for part in PARTS:
        if not a.parts or part.name in a.parts:
            rows = kept(part, a.out) if a.again else measure(part, a)
            failed += sum(row.error is not None for row in rows)
            if rows:
                write(rows, a.out, part.name)
                draw(rows, a.out, part.name)
    (a.out / "speed.md").write_text(page(a.out), encoding="utf-8")
    print(f"wrote {a.out / 'speed.md'}; {failed} rows failed")
    return int(failed > 0)


def measure(part: Part, a: argparse.Namespace) -> list[BenchRow]:
    """Runs one part; what is measured is on disk at once."""
    sweep, rows = part.sweep(a), list[BenchRow]()
    with progress_rows(total(sweep)) as step:
        for row in run(sweep, lambda rows, what: step(rows, what and f"{part.name}, {what}")):
            rows.append(row)
            write(rows, a.out, part.name)
            print(f"{part.name}: {name_of(row)}, {row.context} tokens: {row.error or 'done'}", flush=True)
    return rows


def kept(part: Part, out: Path) -> list[BenchRow]:
    """What was measured before; none if the part was not."""
    path = out / f"{part.name}.jsonl"
    return read_file(path, BenchRow) if path.exists() else []


def page(out: Path) -> str:
    """Tables of all parts in ``out``, under what they were measured with."""
    found = [(part, rows) for part in PARTS if (rows := kept(part, out))]
    lines = ["The models, by their shapes:", "", *(f"- *{name}*: `{shape}`" for shape, name in NAMES.items()), ""]
    for part, rows in found:
        lines += [f"## {part.name}", "", part.about, "", made_with(rows), "", table(rows), ""]
    return "\n".join(lines)


def made_with(rows: Sequence[BenchRow]) -> str:
    """Hardware, versions, revision and date."""
    row = next((row for row in rows if row.error is None), rows[0])
    made = row.made_with
    libraries: dict[str, str] = {}
    for one in rows:
        libraries |= {f"{name} for kvpress" if one.library == "kvpress" and name != "kvpress" else name: version
                      for name, version in one.made_with.versions.items()}  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in libraries.items())
    revision = f", revision {made.revision[:12] + made.revision[40:]}" if made.revision else ""
    return f"{made.device}, {row.hardware}, {row.threads} threads, {made.dtype}; {versions}{revision}; {row.time[:10]}."


def table(rows: Sequence[BenchRow]) -> str:
    """Markdown: medians, and from the 20th to the 80th percentile of the time of a token."""
    head = ("model", "cache", "context", "rows", "read, s", "compress, s", "ms per token", "20–80 %", "tokens/s",
            "× plain", "× floor", "cache, MiB", "peak, MiB")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---|---" + "|--:" * (len(head) - 2) + "|"]
    for row in rows:
        span = "" if row.decode is None else f"{row.decode.p20 * 1e3:.3g}–{row.decode.p80 * 1e3:.3g}"
        model = "overhead" if row.kind == "overhead" else NAMES.get(row.made_with.model, row.made_with.model)
        cells = (model, f"`{name_of(row)}`", f"{row.context:,}",
                 str(row.batch or ""), _median(row.prefill), _median(row.compression), _median(row.decode, 1e3), span,
                 _median(row.throughput), _median(row.speedup), _median(row.over_floor), _mib(row.cache_bytes),
                 _mib(row.peak_bytes))  # fmt: skip
        lines.append("| " + " | ".join(cells if row.error is None else (*cells[:4], row.error)) + " |")
    layers = [f"`{name_of(row)}` {_median(row.per_layer, 1e6)}" for row in rows if row.per_layer]
    return "\n".join(lines) + (f"\n\nOverhead, µs per layer and token: {', '.join(layers)}." if layers else "")


def _median(spread: Percentiles | None, scale: float = 1.0) -> str:
    value = 0.0 if spread is None else spread.median * scale
    return "" if spread is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / MIB:,.1f}"


if __name__ == "__main__":
    sys.exit(main())
