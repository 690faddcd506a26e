"""A made-up evaluation, written as the runner writes one: rows of the real schema, scores of a toy model of methods."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepkv.measure import bootstrap, wilson

ENVIRONMENT = {
    "versions": {"torch": "2.13.0", "transformers": "5.23.0", "keepkv": "0.1.0"},
    "device": "cpu",
    "dtype": "float32",
    "revision": "0123456789abcdef0123456789abcdef01234567",
}
PROSE = "the river bends past old mills where quiet herons wait for trout and evening light falls on the weir".split()
SPANS = ("none", "fair", "protect", "lambda=0.5")


@dataclass(frozen=True)
class Sizes:
    """What the made-up run covers. skill: of each method, 0 as good as random, 1 as good as the full cache."""

    tasks: Sequence[str] = ("qa-1", "needle", "secret")
    lengths: Sequence[int] = (512, 1024)
    modes: Sequence[str] = ("agnostic", "aware")
    methods: Sequence[str] = ("snapkv", "random", "keepkv", "keepkv:key=zip", "kvpress/snapkv")
    budgets: Sequence[Any] = (0.1, 0.25, 0.5)
    items: int = 8
    layers: int = 4
    heads: int = 2
    tokens: int = 60


SMALL = Sizes()


def write(into: Path, sizes: Sizes = SMALL, *, leakage: bool = True, fidelity: bool = True) -> Path:
    """``into``, made and filled."""
    into.mkdir(parents=True, exist_ok=True)
    run = {"model": "embedded", "tasks": sizes.tasks, "lengths": sizes.lengths, "modes": sizes.modes}
    run |= {"methods": sizes.methods, "budgets": sizes.budgets, "items": sizes.items, "seeds": [17], "shares": "tokens"}
    (into / "run.json").write_text(json.dumps(run | {"environment": ENVIRONMENT, "started": "x"}), encoding="utf-8")
    keys = [
        {"task": task, "length": length, "mode": mode, "method": method, "budget": budget}
        for task in sizes.tasks
        for length in sizes.lengths
        for mode in sizes.modes
        for method, budget in [("full", 1.0), *((m, b) for b in sizes.budgets for m in sizes.methods)]
    ]
    items = [row for key in keys for row in _items(key, sizes)]
    lines(into / "items.jsonl", items)
    lines(into / "speed.jsonl", [_speed(key, sizes) for key in keys])
    lines(into / "maps.jsonl", [_map(key, sizes) for key in keys])
    lines(into / "cells.jsonl", _cells(keys, items, sizes))
    if leakage:
        lines(into / "leakage.jsonl", _leakage(sizes))
    if fidelity:
        lines(into / "fidelity.jsonl", _fidelity(sizes))
    return into


def lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _share(budget: Any) -> float:
    return budget if isinstance(budget, float) else 0.3


def _skill(key: dict[str, Any]) -> float:
    """Expected score of a cell."""
    ceiling = 0.97 - 0.25 * random.Random(key["task"]).random() - 0.00004 * key["length"]
    if key["method"] == "full":
        return ceiling
    own = 0.0 if key["method"] == "random" else random.Random(key["method"]).random()
    own += 0.25 * (random.Random(key["method"] + key["task"]).random() - 0.5)
    own += 0.2 if key["mode"] == "aware" and "snap" in key["method"] else 0.0
    share = _share(key["budget"])
    return ceiling * min(1.0, max(0.01, share ** (1.6 * (1.05 - max(0.0, min(1.0, own))))))


def _items(key: dict[str, Any], sizes: Sizes) -> Iterable[dict[str, Any]]:
    expected, ratio = _skill(key), _share(key["budget"]) * 1.02 if key["method"] != "full" else 1.0
    for i in range(sizes.items):
        luck = random.Random(f"{key['task']}{key['length']}{i}")  # the same items for every method
        depth = (i % 8) / 7 if sizes.items < 11 else (i % 11) / 10
        scores = [float(luck.random() < expected * (1.15 - 0.4 * abs(depth - 0.8))) for _ in range(4)]
        failed = key["method"].startswith("kvpress") and i == 3 and key["task"] == sizes.tasks[0]
        yield key | {
            "seed": 17 + i, "tokens": key["length"] - 14, "score": None if failed else sum(scores) / 4,
            "scores": [] if failed else scores, "leaked": [key["task"] == "secret" and luck.random() > expected] * 4,
            "replies": [" 4821."] * 4, "ratio": ratio, "bytes": 1000.0 * ratio * key["length"],
            "full_bytes": 1000.0 * key["length"], "slots": ratio * key["length"], "compressed": ratio < 1,
            "tags": {"depth": depth} if key["task"] == "needle" else {},
            "error": "OutOfMemory: <b>no room</b> for 3 GiB" if failed else None,
        }  # fmt: skip


def _speed(key: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    slow = 1 + random.Random(key["method"]).random()
    read, written = sizes.items * key["length"], sizes.items * 40
    return key | {
        "seeds": [17 + i for i in range(sizes.items)], "prefill_s": read * slow / 9000,
        "answer_s": written * (0.4 + _share(key["budget"])) * slow / 400, "tokens_read": read,
        "tokens_written": written, "peak_bytes": None,
    }  # fmt: skip


def _map(key: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    luck = random.Random(f"{key['method']}{key['budget']}{key['task']}")
    share = 1.0 if key["method"] == "full" else _share(key["budget"])
    words = [PROSE[i % len(PROSE)] for i in range(sizes.tokens)]
    place = sizes.tokens // 3
    words[place : place + 6] = ["code", "of", "amber", "falcon", "is", "4821"]
    near = [share + 2 * share * math.exp(-((i - place - 3) ** 2) / 18) * _skill(key) for i in range(sizes.tokens)]
    survival = [min(1.0, max(0.0, near[i] * 2 * luck.random())) if share < 1 else 1.0 for i in range(sizes.tokens)]
    tilt = 0.8 if "pyramid" in key["method"] or "key" in key["method"] else 0.1
    heads = range(sizes.heads)
    kept = [
        [round(share * sizes.tokens * (1 + tilt * (1 - 2 * layer / sizes.layers) * luck.random())) for _ in heads]
        for layer in range(sizes.layers)
    ]
    return key | {
        "seed": 17, "kept": kept, "survival": survival, "tokens": [" " + word for word in words],
        "questions": ["\nWhat is the code of amber falcon?", "\nWho was there? <i>"],
        "answers": [" 4821.", " nobody"],
    }  # fmt: skip


def _cells(keys: list[dict[str, Any]], items: list[dict[str, Any]], sizes: Sizes) -> Iterable[dict[str, Any]]:
    own = [items[i : i + sizes.items] for i in range(0, len(items), sizes.items)]
    full: dict[int, float] = {}
    for key, rows in zip(keys, own, strict=True):
        scored = [row for row in rows if row["error"] is None]
        full = {row["seed"]: row["score"] for row in rows} if key["method"] == "full" else full
        score, minus = (bootstrap([row["score"] - less * full[row["seed"]] for row in scored]) for less in (0, 1))
        leaks = [any(row["leaked"]) for row in rows]
        speed = _speed(key, sizes)
        yield key | {
            "n": len(scored), "failed": len(rows) - len(scored), "score": score.mean,
            "low": score.low, "high": score.high, "minus_full": minus.mean, "minus_full_low": minus.low,
            "minus_full_high": minus.high, "ratio": rows[0]["ratio"], "bytes": rows[0]["bytes"],
            "full_bytes": rows[0]["full_bytes"], "peak_bytes": None,
            "read_per_s": speed["tokens_read"] / speed["prefill_s"],
            "written_per_s": speed["tokens_written"] / speed["answer_s"],
            "leaked": sum(leaks) / len(leaks) if key["task"] == "secret" else None, "seed": [17], **ENVIRONMENT,
        }  # fmt: skip


def _leakage(sizes: Sizes) -> Iterable[dict[str, Any]]:
    for method in list(sizes.methods)[:5]:
        for order in ("defence-first", "directive-first", "interleaved"):
            for spans in SPANS:
                for removed in (0.0, 0.2, 0.4, 0.6, 0.8, 0.9):
                    own = random.Random(method + order).random()
                    weight = {"none": 1.0, "fair": 0.5, "protect": 0.1, "lambda=0.5": 0.3}[spans]
                    leak = round(weight * math.exp(-(((removed - 0.3 - own / 2) * 4) ** 2)) * (0.3 + own) / 1.3 * 40)
                    follows = round(40 * (1 - removed**3))
                    yield {
                        "method": method, "order": order, "spans": spans, "removed": removed, "n": 40,
                        "leak": leak / 40, "leak_low": wilson(leak, 40)[0], "leak_high": wilson(leak, 40)[1],
                        "directive": follows / 40, "directive_low": wilson(follows, 40)[0],
                        "directive_high": wilson(follows, 40)[1], "keep_defence": 1 - removed**0.5,
                        "keep_directive": 1 - removed**2, **ENVIRONMENT,
                    }  # fmt: skip


def _fidelity(sizes: Sizes) -> Iterable[dict[str, Any]]:
    rows = [("full", {}, 1.0), *((m, {}, b) for b in sizes.budgets for m in ("random", "snapkv"))]
    rows += [("keepkv", {"key": "zip"}, b) for b in sizes.budgets]
    for method, options, budget in rows:
        loss = 0.0 if method == "full" else (1 - _share(budget)) * (8 if method == "random" else 3)
        values = {"kl": loss, "reverse_kl": loss / 2, "top1": 1 / (1 + loss), "output_error": loss / 9}
        values |= {"prefix": 32 / (1 + loss), "prefix_share": 1 / (1 + loss), "first_token": 1.0, "loyalty": 0.0}
        metrics = {k: {"mean": v, "low": 0.9 * v, "high": 1.1 * v, "values": [v, v]} for k, v in values.items()}
        yield {
            "model": "embedded", "method": method, "options": options, "budget": budget, "slots": 30.0, "bytes": 1e5,
            "full_bytes": 1e6, "ratio": _share(budget), "context": 384, "continuation": 128, "greedy": 32,
            "segments": 2, "metrics": metrics, "layers": {"0": metrics["output_error"]}, "seed": 0, **ENVIRONMENT,
        }  # fmt: skip


def rows(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text("utf-8").splitlines()]


def data_of(text: str) -> dict[str, Any]:
    """The data that a page of the report holds."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data
