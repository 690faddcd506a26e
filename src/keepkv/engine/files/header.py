"""The header of a cache file: one table says all that it may hold; former headers are brought into its form first."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from keepkv.engine.files.schema import (
    Check,
    each,
    either,
    flag,
    mapping,
    nothing,
    number,
    pair,
    plain,
    table,
    text,
    whole,
)  # fmt: skip
from keepkv.engine.state import Progress
from keepkv.store import choose

FORMAT, FORMER = "keepkv-cache-2", "keepkv-cache-1"
MOST_ROWS = 1 << 16

SPAN = table({
    "start": whole(), "end": whole(), "mode": text, "weight": number(0), "min_keep": whole(),
    "name": either(nothing, text),
})  # fmt: skip
SPANS = table({
    "spans": each(either(SPAN, each(SPAN))), "fair_lambda": number(0, 1), "on_overflow": text, "scoring": text,
    "prompt": flag,
}, may_lack=("prompt",))  # fmt: skip
ATTENTION = table({"scaling": number(), "softcap": either(nothing, number(1e-6))}, may_lack=("scaling", "softcap"))
TALLY = table({"compressions": whole(), "overflows": whole(), "seconds": number(0)})
# A field that came later starts as a fresh one does.
FIRST = ("seen", "settled", "pending", "compressed", "record_past", "prefilling", "query_heads")
PROGRESS = table(
    {x.name: flag if x.type in ("bool", bool) else whole() for x in fields(Progress)},
    may_lack=[x.name for x in fields(Progress) if x.name not in FIRST and x.default is not MISSING],
)
OURS = table({"kind": text, "host": PROGRESS, "tally": TALLY, "attention": ATTENTION})
STOCK = table({"kind": text, "cumulative_length": whole(), "record_past": flag})


WHEN = table({"prefill": either(nothing, text), **dict.fromkeys(("every", "cap"), either(nothing, whole(1)))}, ["cap"])


def options(value: Any, where: str) -> None:
    """Options of a method: plain data, and a schedule."""
    mapping(plain)(value, where)
    if isinstance(when := value.get("when"), dict):
        WHEN(when, f"{where}.when")


def layer(value: Any, where: str) -> None:
    """A layer of ours, or one of transformers'."""
    is_ours = isinstance(value, dict) and value.get("kind") == "keepkv"
    (OURS if is_ours else STOCK)(value, where)


BUDGET: Check = either(whole(1), number(0, 1), text)
HEADER: Check = table({
    "model": mapping(plain),
    "origin": table({
        "settings": mapping(plain), "adapters": each(text), "weights": either(nothing, text),
        "unread": either(nothing, text),
    }),
    "method": text,
    "options": options,
    "budget": BUDGET,
    "seed": whole(-(1 << 63), (1 << 64) - 1),
    "store": pair(text, mapping(plain)),
    "codec": pair(text, mapping(plain)),
    "calibrations": mapping(text),
    "select": either(nothing, pair(text, mapping(plain))),
    "compressing": flag,
    "spans": either(nothing, SPANS),
    "asked": table({"budget": BUDGET, "spans": either(nothing, SPANS)}),
    "columns": whole(),
    "decoded": each(whole()),
    "fed": each(pair(whole(), flag)),
    "layers": each(layer),
}, may_lack=("asked", "fed", "select"))  # fmt: skip


def checked(format: str, header: Any, rows: int, masked: bool) -> dict[str, Any]:
    """``header`` of a file of ``format`` with so many ``rows``, in the form of ``HEADER``. masked: whether it holds
    which columns are tokens. Raises ``ValueError`` where it is not that."""
    made = _of_former(header, min(rows, MOST_ROWS), masked) if format == FORMER else header
    HEADER(made, "")
    found: dict[str, Any] = made
    return found


def _of_former(header: Any, rows: int, masked: bool) -> Any:
    """What a header of the former format says, in the present one. It says nothing of weights and settings, nor of the
    recording of layers with a sliding window."""
    if not isinstance(header, dict) or not isinstance(header.get("layers"), list):
        return header
    unknown: dict[str, Any] = {"settings": {}, "adapters": [], "weights": None, "unread": None}
    layers: list[Any] = []
    store: Any = "auto"
    decoded: Any = 0
    for one in header["layers"]:
        entry: Any = dict(one) if isinstance(one, dict) else one
        if isinstance(entry, dict) and entry.get("kind") == "keepkv":
            store = entry.pop("store", store)
            if isinstance(host := entry.get("host"), dict):
                decoded = host.get("decoded", decoded)
                entry["host"] = {
                    "settled": host.get("seen"),
                    **{name: x for name, x in host.items() if name != "decoded"},
                }
        elif isinstance(entry, dict):
            entry = {"record_past": False, **entry}
        layers.append(entry)
    text(store, "layers.store")
    layout, codec = choose(store, "none", ragged=False)  # names of before codecs; "int8" was a rectangle
    told = {"calibrations": {}, "origin": unknown, "decoded": [decoded] * rows}
    made = {**told, "store": [layout, {}], "codec": [codec, {}], **header, "layers": layers}
    if made.pop("gaps", False) and not masked:
        raise ValueError("an earlier version wrote it after a padded second prompt, without its mask")
    return made
