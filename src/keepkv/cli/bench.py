"""``keepkv bench``: speed and memory, beside other libraries and beside what the memory's bandwidth allows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from keepkv.cli.measured import deliver
from keepkv.cli.options import AsJson, Import, Methods, Texts
from keepkv.cli.output import console, one_line_errors, table
from keepkv.errors import KeepKVError

if TYPE_CHECKING:
    from keepkv.bench.rows import BenchRow
    from keepkv.bench.systems import System
    from keepkv.measure.interval import Percentiles

MIB = 1 << 20


@one_line_errors
def bench(
    model: Annotated[Texts, Option(help="Directory or Hub name. Repeatable; the embedded model if none.")] = None,
    shape: Annotated[
        Texts, Option(help="Random weights: layers=4,hidden=1024,heads=16,kv_heads=4,head_dim=64,… Repeatable.")
    ] = None,
    method: Methods = None,
    store: Annotated[Texts, Option(help="auto, dense, flat, int8, static:capacity=N. Repeatable.")] = None,
    budget: Annotated[
        Texts,
        Option("--budget", "--budgets", "-b", help="Share of the tokens (0.1), or slots per head. Repeatable."),
    ] = None,
    peer: Annotated[
        Texts,
        Option("--peer", "--peers", "-p", help="plain, quanto-4, hqq-4, fp8, kvpress:METHOD …, or none. Repeatable."),
    ] = None,
    kvpress_python: Annotated[str | None, Option(help="Python of the environment of kvpress 0.5.5.")] = None,
    context: Annotated[list[int] | None, Option("--context", "-c", help="Tokens read. Repeatable.")] = None,
    batch: Annotated[list[int] | None, Option(help="Batch size. Repeatable.")] = None,
    cap: Annotated[
        str | None,
        Option(help="Memory for the cache: 2GiB, or plain@2, the plain cache at batch 2. The batch follows."),
    ] = None,
    device: Annotated[Texts, Option(help="cpu, cuda, cuda:1 …; a GPU where there is one. Repeatable.")] = None,
    dtype: Annotated[str, Option(help="auto (the model's), float32, bfloat16, float16.")] = "auto",
    new: Annotated[int, Option(help="Tokens decoded in a turn.")] = 32,
    repeats: Annotated[int, Option(help="Measurements of each row.")] = 5,
    prefills: Annotated[int, Option(help="Of these, how many read the prompt anew.")] = 3,
    chunk: Annotated[int | None, Option(help="Tokens of the prompt read at once; all if absent.")] = None,
    threads: Annotated[int | None, Option(help="CPU threads per process.")] = None,
    together: Annotated[int, Option(help="Processes alive at once, which take turns.")] = 4,
    overhead: Annotated[bool, Option(help="Also rows of what Python costs per layer.")] = True,
    plots: Annotated[bool, Option(help="Pictures beside the files of --out.")] = False,
    seed: Annotated[int, Option(help="Random seed.")] = 0,
    engine: Annotated[
        str | None, Option(help="vllm: requests inside that engine, in --cap of KV memory, with and without keepkv.")
    ] = None,
    requests: Annotated[int, Option(min=1, help="Of --engine: requests that are sent at once.")] = 24,
    block: Annotated[int | None, Option(min=1, help="Of --engine: slots of a block; its own choice if absent.")] = None,
    out: Annotated[str | None, Option(help="Directory for bench.jsonl, bench.csv and pictures.")] = None,
    imports: Import = None,
    as_json: AsJson = False,
) -> None:
    """Benchmark prefill, compression, decoding and memory, against the memory-bandwidth limit.

    Each row is a process of its own; rows at the same place take turns, so that what disturbs one disturbs all. The
    floor is the time that memory takes for the weights, slots and votes of a token, at the speed at which it copies.

    \b
    Examples:
      keepkv bench
      keepkv bench --shape layers=4,hidden=1024,heads=16,kv_heads=4 -m keepkv -m snapkv -b 0.1 -c 4096 -c 16384
      keepkv bench --shape layers=8,hidden=1024,heads=16 --cap plain@2 -b 0.2 -c 4096 --store auto --store int8
      keepkv bench --model Qwen/Qwen3-0.6B --device cuda --dtype bfloat16 --batch 1 --batch 8 --plots --out speed
      keepkv bench -m adakv -p plain -p kvpress:adakv --kvpress-python kvpress-environment/bin/python
      keepkv bench --engine vllm --cap 12MiB -m snapkv -m keepkv2 -b 0.25 -c 800 --new 64 --plots --out served
    """
    import torch
    from transformers.utils import logging

    from keepkv.bench.plan import Sweep, by_budget, total
    from keepkv.bench.plots import draw, name_of, need_matplotlib
    from keepkv.bench.run import run
    from keepkv.bench.shapes import Shape
    from keepkv.bench.systems import peers
    from keepkv.core.budget import Budget
    from keepkv.embedded import embedded_model
    from keepkv.measure.files import folder

    if plots:
        need_matplotlib()
        if out is None:
            raise KeepKVError("--plots draws beside the files of --out: give --out DIRECTORY")
    if engine is not None:
        from keepkv.cli.bench_engine import bench_engine

        return bench_engine(
            engine, model, method, budget, peer, cap, context, new, requests, block, dtype, repeats, seed, plots, out,
            as_json,
        )  # fmt: skip
    if cap is not None and batch:
        raise KeepKVError("--cap decides the batch: give either --cap or --batch")
    into = None if out is None else folder(out)
    budgets: list[float | int | str] = [Budget.of(text).value for text in budget or ("0.1",)]
    ours = _ours(method or ["auto"], store or ["auto"], budgets)
    theirs = peers([name for name in peer or ["plain"] if name != "none"], budgets)
    if kvpress_python is None and any(one.library == "kvpress" for one in theirs):
        raise KeepKVError("kvpress runs in an environment of its own: name its Python with --kvpress-python")
    models: list[str | Shape] = [*(model or []), *map(Shape.read, shape or [])]
    sweep = Sweep(
        models=tuple(models or [embedded_model()]),
        systems=by_budget([*ours, *theirs]),
        contexts=tuple(context or (1024,)),
        batches=tuple(batch or (1,)),
        cap=cap,
        devices=tuple(device or ("cuda" if torch.cuda.is_available() else "cpu",)),
        dtype=dtype, new=new, repeats=repeats, prefills=prefills, chunk=chunk, threads=threads, together=together,
        overhead=overhead, kvpress_python=kvpress_python, seed=seed,
    )  # fmt: skip
    logging.disable_progress_bar()
    kept = "" if into is None else f"The rows until now are in {into}. "
    rows = deliver(
        lambda step: run(sweep, step), total(sweep), f"{kept}The same command starts anew.",
        None if into is None else Path(into), as_json, _show, draw if plots else None,
    )  # fmt: skip
    if failed := [row for row in rows if row.error]:
        raise KeepKVError(f"{len(failed)} of {len(rows)} rows failed, e.g. {name_of(failed[0])}: {failed[0].error}")


def _ours(methods: list[str], stores: list[str], budgets: list[float | int | str]) -> list[System]:
    """Raises ``KeepKVError`` where a name or an option is not known, before anything is measured."""
    from keepkv.bench.systems import System
    from keepkv.cli.arguments import variant as read

    made = []
    for variant in map(read, methods):
        options = dict(variant.options)
        own = {"store": options.pop("store", None), "store_options": options.pop("store_options", {})}
        one = System("keepkv", variant.method, options=options, **own)
        for layout in stores:
            placed = _placed(one, layout)
            made += [replace(placed, budget=None if one.method == "full" else budget) for budget in budgets]
    return list({(one.label, one.store, str(one.store_options), str(one.budget)): one for one in made}.values())


def _placed(one: System, layout: str) -> System:
    from keepkv.store import STORES
    from keepkv.store.base import FORMER

    name, _, rest = layout.partition(":")
    if name == "auto":
        return one
    if name not in FORMER:
        STORES.factory(name)
    values = dict(pair.partition("=")[::2] for pair in rest.split(",") if pair)
    try:
        return replace(one, store=name, store_options={key: int(value) for key, value in values.items()})
    except ValueError as error:
        raise KeepKVError(f"store {layout!r}: expected NAME or NAME:key=N, as in static:capacity=512") from error


def _show(rows: Sequence[BenchRow]) -> None:
    from keepkv.bench.plots import name_of

    groups: dict[tuple[Any, ...], list[BenchRow]] = defaultdict(list)
    for row in rows:
        groups[row.kind, row.made_with.model, row.made_with.device, row.context].append(row)
    out = console()
    for (kind, model, device, context), mine in groups.items():
        title = "overhead of Python" if kind == "overhead" else f"{context:,} tokens"
        where = f"{device} {mine[0].hardware}".strip()
        out.print(f"\n[bold]{title}[/bold], {model}, {where}, {mine[0].made_with.dtype}")
        last = "µs/layer" if kind == "overhead" else "peak"
        made = table(
            "", "rows", "read s", "comp. s", "ms/tok", "tok/s", "×plain", "×floor", "MiB", last,
        )  # fmt: skip
        for row in mine:
            peak = _number(row.per_layer, 1e6) if kind == "overhead" else _mib(row.peak_bytes)
            numbers = (
                str(row.batch or ""), _number(row.prefill), _number(row.compression), _number(row.decode, 1e3),
                _number(row.throughput), _number(row.speedup), _number(row.over_floor),
                _mib(row.cache_bytes), peak,
            )  # fmt: skip
            made.add_row(name_of(row), *(("failed",) if row.error else numbers))
        out.print(made)
        for row in mine:
            if row.error:
                out.print(f"{name_of(row)}: {row.error}", markup=False)
    out.print(
        "\nMedians. read: the prompt, compression included. ms/tok: a forward of all rows. ×plain: of the plain cache's"
    )
    out.print(
        "tok/s. ×floor: 1 is as fast as memory copies what must be read. MiB: of the cache; peak: of the process."
    )


def _number(found: Percentiles | None, scale: float = 1.0) -> str:
    """Four digits, as people write them: 10,060 and 0.0002."""
    if found is None:
        return ""
    value = found.median * scale
    digits = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(6, max(0, digits))}f}"


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / MIB:,.1f}"
