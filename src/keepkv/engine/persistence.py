"""Caches as files: safetensors with a checked header, never pickle."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from keepkv.core.when import When
from keepkv.engine.layer import Layer
from keepkv.errors import CacheFileError, CacheStateError
from keepkv.methods import METHODS, Method
from keepkv.spans import SpanPolicy
from keepkv.store import STORES

if TYPE_CHECKING:
    from keepkv.engine.cache import Cache

FORMAT = "keepkv-cache-1"
_HOST = ("seen", "pending", "decoded", "compressed", "record_past", "prefilling", "query_heads")
_COUNTS = ("merged", "dropped", "votes_dropped", "mass_dropped")


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What must agree for a saved cache to make sense with a model: its shape, not its weights."""
    config = model.config.get_text_config(decoder=True)
    names = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    return {name: getattr(config, name, None) for name in names} | {"dtype": str(model.dtype)}


def save(cache: Cache, path: Path) -> None:
    """Write ``cache`` to ``path``; see ``Cache.save``."""
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    for i, layer in enumerate(cache.layers):
        tensors |= {f"{i}.{name}": x for name, x in _layer_tensors(layer).items()}
        layers.append(_layer_header(layer))
    clock = cache.plan.clock
    if clock.seen is not None and clock.positions is not None:
        tensors |= {"clock.seen": clock.seen, "clock.positions": clock.positions}
    spans = cache.plan.spans
    tensors |= {} if spans is None else {f"spans.{name}": x for name, x in spans.tensors().items()}
    tensors = {name: x.detach().contiguous().clone() for name, x in tensors.items()}
    method = cache.plan.method
    header = {
        "model": cache.attached_config,
        "method": method.name,
        "options": {k: asdict(v) if isinstance(v, When) else v for k, v in method.options.items()},
        "budget": cache.plan.budget.value,
        "seed": cache.plan.seed,
        "compressing": cache.plan.compressing,
        "spans": None if spans is None else spans.policy.to_dict(),
        "columns": clock.columns,
        "layers": layers,
    }
    try:
        text = json.dumps(header, sort_keys=True)
    except TypeError as error:
        raise CacheStateError(f"the options of method {method.name!r} cannot be written to a file: {error}") from error
    save_file(tensors, path, {"format": FORMAT, "header": text, "digest": _digest(text, tensors)})


def load(kind: type[Cache], path: Path, model: PreTrainedModel, method: Method | None) -> Cache:
    """Read a cache; see ``Cache.load``. Nothing is built before everything is checked."""
    header, tensors = _read(path)
    expected = fingerprint(model)
    if header["model"] != expected:
        differing = {k: (v, expected.get(k)) for k, v in header["model"].items() if v != expected.get(k)}
        raise CacheFileError(f"{path}: saved from another model; (file, given) differ in {differing}")
    if method is None and header["method"] not in METHODS:
        raise CacheFileError(
            f"{path}: made with method {header['method']!r}, which is not registered here; register it, or pass it as "
            "keepkv.Cache.load(path, model, method=…)"
        )
    store = next((x["store"] for x in header["layers"] if x["kind"] == "keepkv"), None)
    options = {k: When(**v) if k == "when" else v for k, v in header["options"].items()}
    chosen: dict[str, Any] = {"method": header["method"], **options} if method is None else {"method": method}
    spans = SpanPolicy.from_dict(header["spans"]) if header.get("spans") else None
    cache = kind(model, budget=header["budget"], store=store, seed=header["seed"], spans=spans, **chosen)
    cache.plan.compressing = header["compressing"]
    clock = cache.plan.clock
    clock.columns, device = header["columns"], model.device
    if "clock.seen" in tensors:
        clock.seen, clock.positions = tensors["clock.seen"].to(device), tensors["clock.positions"].to(device)
    if cache.plan.spans is not None:
        mine = {n.split(".", 1)[1]: x.to(device) for n, x in tensors.items() if n.startswith("spans.")}
        cache.plan.spans.restore(mine)
    for i, (layer, entry) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        mine = {n.split(".", 1)[1]: x.to(device) for n, x in tensors.items() if n.split(".", 1)[0] == str(i)}
        _restore(layer, entry, mine)
    return cache


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise CacheFileError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != FORMAT:
                raise CacheFileError(f"{path}: not a cache written by keepkv ({meta.get('format')!r}, need {FORMAT!r})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CacheFileError(f"{path}: not a readable safetensors file, or truncated: {error}") from error
    if _digest(meta["header"], tensors) != meta.get("digest"):
        raise CacheFileError(f"{path}: contents do not match their checksum; the file was altered or damaged")
    header: dict[str, Any] = json.loads(meta["header"])
    return header, tensors


def _digest(header: str, tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        x = tensors[name].cpu().contiguous()
        sha.update(f"{name}{x.dtype}{tuple(x.shape)}".encode())
        sha.update(x.flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return sha.hexdigest()


def _layer_tensors(layer: Any) -> dict[str, Tensor]:
    if isinstance(layer, Layer):
        counts = {f"count.{n}": x for n in _COUNTS if (x := getattr(layer.tally, n)) is not None}
        state = {f"state.{name}": x for name, x in layer.state.items()}
        attention = layer.attention or {}
        sinks = {"sinks": attention["sinks"]} if attention.get("sinks") is not None else {}
        return {f"store.{name}": x for name, x in layer.store.tensors().items()} | state | counts | sinks
    if type(layer).__name__ == "DummyLayer":  # by name: transformers before 5.20 does not have it
        return {}
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}
    raise CacheStateError(
        f"a cache with a layer of kind {type(layer).__name__} cannot be saved; only attention layers can"
    )


def _layer_header(layer: Any) -> dict[str, Any]:
    if not isinstance(layer, Layer):
        return {"kind": type(layer).__name__, "cumulative_length": getattr(layer, "cumulative_length", 0)}
    attention = {k: v for k, v in (layer.attention or {}).items() if k != "sinks"}
    host = {name: getattr(layer, name) for name in _HOST}
    tally = {name: getattr(layer.tally, name) for name in ("compressions", "overflows", "seconds")}
    store = next(name for name in STORES if type(layer.store) is STORES.factory(name))
    return {"kind": "keepkv", "store": store, "host": host, "tally": tally, "attention": attention}


def _restore(layer: Any, entry: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if not isinstance(layer, Layer):
        if tensors:
            layer.lazy_initialization(tensors["keys"], tensors["values"])
            layer.keys, layer.values = tensors["keys"], tensors["values"]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = entry["cumulative_length"]
        return
    groups: dict[str, dict[str, Tensor]] = {"store": {}, "state": {}, "count": {}}
    for name, x in tensors.items():
        if name != "sinks":
            group, rest = name.split(".", 1)
            groups[group][rest] = x
    for name, value in entry["host"].items():
        setattr(layer, name, value)
    for name, value in {**entry["tally"], **groups["count"]}.items():
        setattr(layer.tally, name, value)
    layer.state = groups["state"]
    if groups["store"]:
        layer.store.restore(groups["store"])
        part = layer.part()
        layer.lazy_initialization(part.keys, part.values)
    if entry["attention"]:
        layer.attention = {**entry["attention"], "sinks": tensors.get("sinks")}
