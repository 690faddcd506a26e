"""``keepkv bench --engine``: a fixed KV memory inside a serving engine, with and without keepkv."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from keepkv.cli.arguments import variant
from keepkv.cli.measured import deliver
from keepkv.cli.output import console, table
from keepkv.core.budget import Budget
from keepkv.core.registry import known_as
from keepkv.errors import KeepKVError, UnknownName

ENGINES = {"vllm": "keepkv.integrations.vllm.bench"}  # by name: integrations stand above the command line


def bench_engine(
    engine: str, model: list[str] | None, method: list[str] | None, budget: list[str] | None,
    peer: list[str] | None, cap: str | None,
    context: list[int] | None, new: int, requests: int, block: int | None, dtype: str, repeats: int, seed: int,
    plots: bool, out: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure, show and write."""
    from keepkv.embedded import embedded_model
    from keepkv.measure.files import folder

    if engine not in ENGINES:
        raise UnknownName("engine", engine, ENGINES)
    made: Any = import_module(ENGINES[engine])
    peers = [known_as(name, made.PEERS, "peer") for name in peer or ["plain"] if name != "none"]
    into = None if out is None else folder(out)
    load = made.Load(
        model=_one("--model", model, embedded_model()), requests=requests, prompt=_one("--context", context, 1024),
        reply=new, kv_bytes=_bytes(cap), block=block, dtype=dtype, seed=seed,
    )  # fmt: skip
    asked = _asked(made, method or ["snapkv"], budget or ["0.25"])
    deliver(
        lambda step: made.bench(load, asked, repeats, step, peers), len(peers) + len(asked),
        "The same command starts anew.", into, as_json, _show, made.draw if plots else None,
    )  # fmt: skip


def _one(flag: str, given: list[Any] | None, usual: Any) -> Any:
    if given and len(given) > 1:
        raise KeepKVError(f"{flag} was given {len(given)} times: an engine is started for one")
    return given[0] if given else usual


def _bytes(cap: str | None) -> int:
    found = None if cap is None or "@" in cap else Budget.of(cap).bytes
    if found is None:
        raise KeepKVError("--engine compares systems in the same KV memory: give --cap BYTES, such as --cap 4GiB")
    return found


def _asked(made: Any, methods: list[str], budgets: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """A label and the keys of a request for each method and budget. Raises ``KeepKVError`` for what is not served,
    before an engine is started."""
    found = []
    for one in map(variant, methods):
        options = dict(one.options)
        when = options.pop("when", None)
        options |= {} if when is None else {"every": when.every}
        for budget in budgets:
            keys = {"method": one.method, "budget": budget, **options}
            made.check(keys)
            found.append((f"{one.label} {budget}", keys))
    return found


def _show(rows: list[Any]) -> None:
    first, out = rows[0], console()
    load, where = first.load, first.made_with
    sent = f"{load.requests} requests of {load.prompt:,} + {load.reply} tokens, {load.kv_bytes / 2**20:,.1f} MiB"
    out.print(f"\n[bold]{sent} of KV memory[/bold], {where.model}, {where.device}, {where.dtype}")
    shown = table("", "blocks", "most at once", "mean", "steps", "preempted", "seconds", "tok/s")
    for row in rows:
        shown.add_row(
            row.label, str(row.blocks), str(row.most_at_once), f"{row.mean_at_once:.1f}", str(row.steps),
            str(row.preemptions), f"{row.seconds.median:.1f}", f"{row.throughput.median:,.0f}",
        )  # fmt: skip
    out.print(shown)
    out.print("seconds, tok/s: medians. most at once, mean: requests that run.")
