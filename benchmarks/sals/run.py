"""What does a selection keep, and what does it cost? ``python -m benchmarks.sals.run --name NAME --model PATH``.

``results/NAME.jsonl``: for each selection and layer, the share of attention that the chosen eighth of the slots has, as
the model itself attends, with sinks and window; the share of the true eighth that is found; and bytes that are read.
Keys, values and queries are the model's own on texts that no calibration has seen; every selection is asked about the
same queries. ``--times``: ``results/times.jsonl``, a token's attention in one layer, in pairs with attention over
everything.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from keepkv import embedded_model, tasks
from keepkv.attention.attend import attend
from keepkv.calibrate import batches, calibrate
from keepkv.calibrate.low_rank import Look
from keepkv.core.layer_info import LayerInfo
from keepkv.core.rope import Rope
from keepkv.core.slots import Slots
from keepkv.engine.cache import Cache
from keepkv.engine.passes.reread import feed
from keepkv.measure.environment import MadeWith
from keepkv.methods import Method
from keepkv.select import Asked, Select, choose, make_select
from keepkv.store import CODECS, STORES, Held, Store
from keepkv.tasks.asking import encode
from keepkv.tasks.text import prose

HERE = Path(__file__).parent / "results"
TASKS = ("niah-multikey-1", "niah-multiquery", "variable-tracking", "qa-1")
NEWEST, SINKS, SHARE, QUERIES = 32, 4, 0.125, 8
ARMS: dict[str, tuple[str, dict[str, Any], str]] = {  # name: codec, its options, selection
    "exact": ("none", {}, "exact"),
    "quest": ("none", {}, "quest"),
    "landmarks": ("none", {}, "landmarks"),
    "loki": ("none", {}, "loki"),
    "codes, int4": ("int4", {}, "codes"),
    "codes, int2": ("int2", {}, "codes"),
    "codes, lloyd-max 2": ("lloyd-max", {"bits": 2}, "codes"),
    "latent, r* = d": ("sals", {"rank": 1.0, "ranked": 1.0}, "latent"),
    "latent, r* = d/8": ("sals", {"rank": 0.25}, "latent"),
    "latent, r* = d/16": ("sals", {"rank": 0.125, "value_bits": 2}, "latent"),
    "codes, r* = d": ("sals", {"rank": 1.0, "ranked": 1.0}, "codes"),
    "codes, r* = d/8": ("sals", {"rank": 0.25}, "codes"),
    "codes, r* = d/16": ("sals", {"rank": 0.125, "value_bits": 2}, "codes"),
    "landmarks, r = d/4": ("sals", {"rank": 0.25}, "landmarks"),
}


def contexts(tokenizer: Any, kind: str, count: int, length: int) -> tuple[list[Tensor], list[Tensor]]:
    """Token ids (1,T) to calibrate with, and ``count`` others (1,length) to ask about."""
    if kind == "prose":
        pieces = [x for x in batches(tokenizer, [" ".join(prose())], 10**9, length) if x.shape[1] == length]
        return pieces[count : count + 4 * count], pieces[:count]
    made = []
    for seed in range(5 * count):
        item = encode(tokenizer, tasks.get(TASKS[seed % len(TASKS)]).generate(tokenizer, length - 64, seed))
        ids = [*item.context, *(t for one in item.asked for t in (*one.prompt, *one.answer))]
        made.append(torch.tensor([ids[:length]]))
    return made[count:], made[:count]


def read(model: Any, ids: Tensor) -> Iterator[tuple[LayerInfo, Slots, Tensor, float]]:
    """Of each layer: its place, all slots of a text, the last queries (1,Hq,T,D) after RoPE, and the scaling."""
    cache = Cache(model, Method(Look()), 1.0).copy(observing=True)
    feed(model, cache, ids, ids.new_ones(len(ids), 0))
    for layer in cache.compressible:
        assert layer.attention is not None
        scaling, queries = float(layer.attention["scaling"]), layer.score_state["queries"][:, :, -QUERIES:]
        yield layer.info, layer.store.view(), queries, scaling


def stored(slots: Slots, info: LayerInfo, codec: str, options: dict[str, Any], known: dict[str, Tensor]) -> Store:
    """A store of ``slots``, the newest of them not encoded."""
    writes = CODECS.build(codec, **options).for_layer(info, known)
    store = STORES.build("dense", Held(codec=writes, layer=info, votes=False))
    old = slots.positions.shape[2] - NEWEST
    store.load(slots.map(lambda x: x[:, :, :old]))
    store.append(slots.keys[:, :, old:], slots.values[:, :, old:], slots.positions[:, 0, old:])
    return store


def measured(
    select: Select,
    store: Store,
    truth: Tensor,
    queries: Tensor,
    scaling: float,
    info: LayerInfo,
    known: dict[str, Tensor],
) -> dict[str, float]:
    """What ``select`` keeps of ``truth``, attention (1,Hq,T,S) of ``queries`` over all slots."""
    older = store.older(NEWEST)
    tokens, h = truth.shape[-1], older.positions.shape[1]
    masses, recalls, counts = [], [], []
    for t in range(queries.shape[2]):
        asked = Asked(queries[:, :, t], torch.tensor([tokens]), older, scaling, None, info, known)
        columns, inside = choose(select, select.scores(asked), older.positions, asked.seen, store.held.codec.together)
        there = torch.zeros(1, h, tokens, dtype=torch.bool)
        there[:, :, -NEWEST:] = True
        there.scatter_(2, older.positions.gather(2, columns).long(), inside)
        share = truth[:, :, t].unflatten(1, (h, -1))
        masses.append(float((share * there[:, :, None]).sum(-1).mean()))
        n = int(inside[0, 0].sum())
        best = share.sum(2)[..., : older.length].topk(n, -1).indices
        recalls.append(float(there.gather(2, best).float().mean()))
        counts.append(n)
    keys, values = store.like()
    sizes = (h, keys.shape[-1], values.shape[-1], torch.bfloat16)
    content, plain = store.held.codec.token_bytes(*sizes), 2 * h * (keys.shape[-1] + values.shape[-1])
    ranking, rest = (
        older.length * select.glance_bytes(store.held.codec, *sizes),
        fmean(counts) * content + NEWEST * plain,
    )
    found = {"mass": fmean(masses), "recall": fmean(recalls), "bytes_ranking": ranking, "bytes_attending": rest}
    return found | {"bytes_plain": tokens * plain, "bytes_held": older.length * content + NEWEST * plain}


def study(model: Any, tokenizer: Any, kind: str, count: int, length: int) -> list[dict[str, Any]]:
    """A row for each arm and layer."""
    fit, texts = contexts(tokenizer, kind, count, length)
    calibrations = [calibrate(which, model, fit) for which in ("sals", "loki")]
    found: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    with torch.no_grad():
        for ids in texts:
            for info, slots, queries, scaling in read(model, ids):
                known = {k: v for one in calibrations for k, v in one.tensors[info.index].items()}
                keys = slots.keys.repeat_interleave(queries.shape[1] // slots.keys.shape[1], 1)
                position = torch.arange(ids.shape[1] - queries.shape[2], ids.shape[1])
                mask = slots.positions[:, :1, None] > position[:, None]
                truth = (queries @ keys.mT * scaling).masked_fill(mask, -torch.inf).softmax(-1)
                for name, (codec, options, which) in ARMS.items():
                    select = make_select(which, SHARE, {"sinks": SINKS, "window": NEWEST})
                    assert select is not None
                    store = stored(slots, info, codec, options, known)
                    found[name, info.index].append(measured(select, store, truth, queries, scaling, info, known))
    made = MadeWith.of(model)
    energy = {x["layer"]: x for x in calibrations[0].made_with["found"]["layers"]}
    rows = []
    for (name, layer), some in found.items():
        values = {k: fmean(x[k] for x in some) for k in some[0]}
        more = {"by_text": [round(x["mass"], 4) for x in some], "energy": energy[layer].get("held_out")}
        rows.append({"arm": name, "layer": layer, "texts": count, "length": length, "kind": kind, **values, **more})
    here = {"device": made.device, "dtype": made.dtype, "versions": made.versions, "revision": made.revision}
    return [row | here for row in rows]


def times(rounds: int) -> list[dict[str, Any]]:
    """A token's attention in a layer of 3 KV heads of 64 and 9 query heads over random slots, in pairs with attention
    over all of them, plain."""
    h, d, groups, rows = 3, 64, 3, []
    known = {"sals_mean": torch.zeros(h, d), "sals_basis": torch.linalg.qr(torch.randn(h * d, h * d))[0]}
    arms: dict[str, tuple[str, dict[str, Any], str | None, int | float]] = {
        "none, all": ("none", {}, None, 1.0),
        "none, exact n = 512": ("none", {}, "exact", 512),
        "int4, all": ("int4", {}, None, 1.0),
        "int4, codes n = 512": ("int4", {}, "codes", 512),
        "sals d/4, all": ("sals", {"rank": 0.25}, None, 1.0),
        "sals d/4, codes n = 512": ("sals", {"rank": 0.25}, "codes", 512),
        "sals d/4, latent n = 512": ("sals", {"rank": 0.25}, "latent", 512),
        "sals d/4, latent n = 1/8": ("sals", {"rank": 0.25}, "latent", 0.125),
    }
    info = LayerInfo(rope=Rope(1.0 / 10_000 ** (torch.arange(0, d, 2) / d)))
    for tokens in (2048, 8192, 32768):
        slots = Slots(
            torch.randn(1, h, tokens, d), torch.randn(1, h, tokens, d), torch.zeros(1, h, tokens),
            torch.arange(tokens, dtype=torch.int32).expand(1, h, -1),
        )  # fmt: skip
        query, seen = torch.randn(1, h * groups, 1, d), torch.tensor([tokens])
        ready = {name: (stored(slots, info, x[0], x[1], known), make_select(x[2], None if x[2] is None else x[3], {}))
                 for name, x in arms.items()}  # fmt: skip
        took: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds):
            for name, (store, select) in ready.items():
                start = time.perf_counter()
                if select is None:
                    attend(query, store.parts(), d**-0.5)
                else:
                    older = store.older(NEWEST)
                    asked = Asked(query[:, :, 0], seen, older, d**-0.5, None, info, known)
                    scores = select.scores(asked)
                    where = choose(select, scores, older.positions, seen, store.held.codec.together)
                    attend(query, iter([older.take(*where), *older.newest]), d**-0.5)
                took[name].append(time.perf_counter() - start)
        plain = took["none, all"][1:]
        for name, some in took.items():
            ratios = [a / b for a, b in zip(some[1:], plain, strict=True)]
            spread = stdev(ratios) / len(ratios) ** 0.5
            rows.append({"arm": name, "tokens": tokens, "ms": 1e3 * median(some[1:]), "ratio": median(ratios),
                         "spread": spread, "rounds": rounds - 1, "threads": torch.get_num_threads(), "device": "cpu",
                         "torch": torch.__version__})  # fmt: skip
    return rows


def main() -> None:
    """Measure, and write rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="embedded")
    parser.add_argument("--model", default=None, help="a directory; the embedded model if absent")
    parser.add_argument("--texts", default="tasks", choices=("tasks", "prose"))
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--times", type=int, default=0, metavar="ROUNDS", help="measure times instead")
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.times:
        with torch.no_grad():
            rows = times(given.times)
        name = "times"
    else:
        path, name = given.model or embedded_model(), given.name
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        rows = study(model, AutoTokenizer.from_pretrained(path), given.texts, given.count, given.length)
        rows = [{"model": name, **row} for row in rows]
    HERE.mkdir(exist_ok=True)
    (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
