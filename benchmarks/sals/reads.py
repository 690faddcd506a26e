"""Bytes that a decoded token reads of a store: watched, operation by operation, beside what the receipt counts.

    python -m benchmarks.sals.reads [--seen 2048 8192 32768]

One layer of SmolLM2's shape (3 KV heads of 64, 9 query heads) in bfloat16, random slots, plain torch. An operation that
gathers reads what it returns; any other reads every entry of its arguments that lie in the store. Content alone is
counted: keys, values, scales, latents.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from keepkv.attention.attend import attend
from keepkv.core.layer_info import LayerInfo
from keepkv.core.rope import Rope
from keepkv.kernels.dispatch import VARIABLE
from keepkv.select import Asked, Select, choose, make_select
from keepkv.store import CODECS, STORES, Held, Store

RESULTS = Path(__file__).parent / "results" / "reads.jsonl"
HEADS, GROUPS, DIM, NEWEST = 3, 3, 64, 32
ROPE = Rope(1.0 / 10_000 ** (torch.arange(0, DIM, 2) / DIM))
GATHERS = {"index_select", "gather", "index"}
ARMS: dict[str, tuple[str, dict[str, Any], str | None]] = {  # codec, its options, selection
    "none, all": ("none", {}, None),
    "sals d/4, all": ("sals", {"rank": 0.25}, None),
    "sals d/4, latent": ("sals", {"rank": 0.25}, "latent"),
    "sals d/4, codes": ("sals", {"rank": 0.25}, "codes"),
    "sals d/8, latent": ("sals", {"rank": 0.125, "value_bits": 2}, "latent"),
}


class Reads(TorchDispatchMode):
    """Counts the bytes that operations read of the tensors ``held``."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self.bytes = 0
        self.held = {x.untyped_storage()._cdata for x in held if x.numel()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        mine = [x for x in _tensors((args, kwargs or {})) if x.untyped_storage()._cdata in self.held]
        if isinstance(out, Tensor) and mine and not _is_view(out, mine):
            gathers = func.overloadpacket.__name__ in GATHERS
            self.bytes += sum((out if gathers else x).numel() * x.element_size() for x in mine)
        return out


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        x = list(x.values())
    return [t for one in x for t in _tensors(one)] if isinstance(x, (list, tuple)) else []


def _is_view(out: Tensor, of: list[Tensor]) -> bool:
    return any(out.untyped_storage()._cdata == x.untyped_storage()._cdata for x in of)


def filled(codec: str, options: dict[str, Any], tokens: int) -> tuple[Store, LayerInfo]:
    """A store that has read ``tokens`` random tokens, the newest of them not encoded."""
    width = HEADS * DIM
    basis = torch.linalg.qr(torch.randn(width, width)).Q
    known = {"sals_mean": torch.zeros(HEADS, DIM), "sals_basis": basis} if codec == "sals" else {}
    info = LayerInfo(rope=ROPE)
    writes = CODECS.build(codec, **options).for_layer(info, known)
    store = STORES.build("dense", Held(codec=writes, layer=info, votes=False))
    keys, values = torch.randn(2, 1, HEADS, tokens, DIM).bfloat16()
    store.append(keys, values, torch.arange(tokens)[None])
    store.after_prefill()
    return store, info


@torch.inference_mode()
def read(store: Store, info: LayerInfo, select: Select | None, tokens: int) -> int:
    """Bytes of content that one token reads."""
    query = torch.randn(1, HEADS * GROUPS, 1, DIM).bfloat16()
    named = store.tensors().items()
    content = [x for name, x in named if name.rpartition(".")[2].startswith(("keys", "values", "rest"))]
    with Reads(content) as seen:
        if select is None:
            attend(query, store.parts(), DIM**-0.5)
            return seen.bytes
        older = store.older(NEWEST)
        asked = Asked(query[:, :, 0], torch.tensor([tokens]), older, DIM**-0.5, None, info, None)
        scores = select.scores(asked)
        chosen = choose(select, scores, older.positions, asked.seen, store.held.codec.together)
        attend(query, [older.take(*chosen), *older.newest], DIM**-0.5)
    return seen.bytes


def counted(store: Store, select: Select | None, selected: int) -> float:
    """The same by the formula of receipts: keys that are looked at, slots that are taken, the newest as they are."""
    keys, values = store.like()
    sizes = (HEADS, keys.shape[-1], values.shape[-1], keys.dtype)
    slots, old = store.slot_bytes(), store.length - NEWEST
    if select is None:
        return old * slots.content + NEWEST * slots.plain
    looked = old * select.glance_bytes(store.held.codec, *sizes)
    return looked + (selected + select.sinks) * slots.content + NEWEST * slots.plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seen", type=int, nargs="*", default=[2048, 8192, 32768])
    parser.add_argument("--selected", type=int, default=512)
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    os.environ[VARIABLE] = "reference"  # what C++ reads, no operation of torch tells
    torch.manual_seed(0)
    print(f"| arm | {' | '.join(f'{x:,}' for x in a.seen)} |\n|---" + "|--:" * len(a.seen) + "|")
    with a.out.open("w", encoding="utf-8") as file:
        for name, (codec, options, which) in ARMS.items():
            select, cells = make_select(which, a.selected if which else None, {}), []
            for tokens in a.seen:
                store, info = filled(codec, options, tokens)
                row: dict[str, Any] = {"arm": name, "seen": tokens, "selected": a.selected if which else None}
                row["read"] = read(store, info, select, tokens)
                row["counted"] = round(counted(store, select, a.selected))
                file.write(json.dumps(row) + "\n")
                cells.append(f"{row['read'] / 1000:,.0f} kB ({row['read'] / row['counted']:.2f})")
            print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
