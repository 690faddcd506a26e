"""Caches as files: safetensors with a checked header, never pickle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from keepkv.core import tensorfile
from keepkv.core.calibration import Given, check_same, digests
from keepkv.core.when import When
from keepkv.engine.devices import input_device
from keepkv.engine.layer import Layer
from keepkv.engine.state import CacheParts, Progress
from keepkv.engine.tally import Tally
from keepkv.engine.versions import holds_nothing
from keepkv.errors import CacheFileError, CacheStateError
from keepkv.methods import METHODS, Method, make_method
from keepkv.spans import SpanPolicy
from keepkv.store import choose

FORMAT = "keepkv-cache-1"


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


def save(cache: CacheParts, path: Path) -> None:
    """Write ``cache`` to ``path``; see ``Cache.save``."""
    shared, settings = cache.shared, cache.shared.settings
    positions, spans, method = shared.positions, shared.spans, settings.method
    if method.name in METHODS and make_method(method.name, method.options) != method:
        raise CacheStateError(
            f"the method of this cache has the name {method.name!r} and other pieces: a file would load as the method "
            "of that name. Give it a name of its own: dataclasses.replace(method, name='mine')."
        )
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, Layer):
            layer.listen()  # a file has no place for what the score has still to see
        tensors |= {f"{i}.{name}": x for name, x in _layer_tensors(layer).items()}
        layers.append(_layer_header(layer))
    if positions.seen is not None and positions.positions is not None:
        tensors |= {"clock.seen": positions.seen, "clock.positions": positions.positions}
    if positions.tokens is not None:
        tensors["clock.tokens"] = positions.tokens
    if positions.offsets is not None:
        tensors["clock.offsets"] = positions.offsets
    tensors |= {} if spans is None else {f"spans.{name}": x for name, x in spans.tensors().items()}
    header = {
        "model": cache.attached_config,
        "method": method.name,
        "options": {k: asdict(v) if isinstance(v, When) else v for k, v in method.options.items()},
        "budget": settings.budget.value,
        "seed": settings.seed,
        "store": [cache.layout, cache.store_options],
        "codec": [cache.codec, cache.codec_options],
        "calibrations": digests(settings.calibrations),
        "compressing": shared.compressing,
        "spans": None if spans is None else spans.policy.to_dict(),
        "columns": positions.columns,
        "decoded": shared.decoded,
        "layers": layers,
    }
    try:
        text = json.dumps(header, sort_keys=True)
    except TypeError as error:
        raise CacheStateError(f"the options of method {method.name!r} cannot be written to a file: {error}") from error
    try:
        tensorfile.write(path, FORMAT, text, tensors)
    except OSError as error:
        raise CacheFileError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


Made = TypeVar("Made", bound=CacheParts)


def load(
    make: Callable[..., Made], path: Path, model: PreTrainedModel, method: Method | None, calibration: Given
) -> Made:
    """Read a cache; see ``Cache.load``. Nothing is built before everything is checked."""
    header, tensors = tensorfile.read(path, FORMAT, "a cache", CacheFileError)
    expected = fingerprint(model)
    if header["model"] != expected:
        differing = {k: (v, expected.get(k)) for k, v in header["model"].items() if v != expected.get(k)}
        raise CacheFileError(f"{path}: saved from another model; (file, given) differ in {differing}")
    if method is None and header["method"] not in METHODS:
        raise CacheFileError(
            f"{path}: made with method {header['method']!r}, which is not registered here; register it, or pass it as "
            "keepkv.Cache.load(path, model, method=…)"
        )
    options = {k: When(**v) if k == "when" else v for k, v in header["options"].items()}
    chosen: dict[str, Any] = {"method": header["method"], **options} if method is None else {"method": method}
    spans = SpanPolicy.from_dict(header["spans"]) if header.get("spans") else None
    cache = make(
        model, budget=header["budget"], seed=header["seed"], spans=spans, calibration=calibration,
        **_store(header), **chosen,
    )  # fmt: skip
    check_same(header.get("calibrations", {}), cache.shared.settings.calibrations, path)
    shared, device = cache.shared, input_device(model)
    shared.compressing = header["compressing"]
    positions = shared.positions
    positions.columns = header["columns"]
    if "clock.seen" in tensors:
        positions.seen, positions.positions = (tensors[f"clock.{x}"].to(device) for x in ("seen", "positions"))
        if "clock.tokens" in tensors:
            positions.tokens = tensors["clock.tokens"].to(device)
        elif header.get("gaps"):
            raise CacheFileError(f"{path}: an earlier version wrote it after a padded second prompt, without its mask")
        elif bool((positions.seen < positions.columns).any()):
            positions.padded_on_the_left(positions.columns)
        counted = (x["host"].get("decoded", 0) for x in header["layers"] if x["kind"] == "keepkv")  # in former files
        shared.decoded = header.get("decoded") or [next(counted, 0)] * len(positions.seen)
    if "clock.offsets" in tensors:
        positions.offsets = tensors["clock.offsets"].to(device)
    if shared.spans is not None:
        shared.spans.restore({n.split(".", 1)[1]: x.to(device) for n, x in tensors.items() if n.startswith("spans.")})
    for i, (layer, entry) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        mine = {n.split(".", 1)[1]: x.to(device) for n, x in tensors.items() if n.split(".", 1)[0] == str(i)}
        _restore(layer, entry, mine)
    return cache


def _store(header: dict[str, Any]) -> dict[str, Any]:
    """Layout and codec with their options."""
    if "store" in header:
        (layout, mine), (codec, its) = header["store"], header["codec"]
        return {"store": layout, "codec": codec, "store_options": mine, "codec_options": its}
    former = next((x["store"] for x in header["layers"] if x["kind"] == "keepkv"), "auto")
    layout, codec = choose(former, "none", ragged=False)  # names of before codecs; "int8" was a rectangle
    return {"store": layout, "codec": codec}


def _layer_tensors(layer: Any) -> dict[str, Tensor]:
    if isinstance(layer, Layer):
        groups = {"store": layer.store.tensors(), "state": layer.score_state, "count": layer.tally.tensors()}
        sinks = (layer.attention or {}).get("sink_logits")
        named = {f"{group}.{name}": x for group, held in groups.items() for name, x in held.items()}
        return named if sinks is None else {**named, "sinks": sinks}
    if holds_nothing(layer):
        return {}
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}
    raise CacheStateError(
        f"a cache with a layer of kind {type(layer).__name__} cannot be saved; only attention layers can"
    )


def _layer_header(layer: Any) -> dict[str, Any]:
    if not isinstance(layer, Layer):
        return {"kind": type(layer).__name__, "cumulative_length": getattr(layer, "cumulative_length", 0)}
    attention = {k: v for k, v in (layer.attention or {}).items() if k != "sink_logits"}
    tally = {name: getattr(layer.tally, name) for name in ("compressions", "overflows", "seconds")}
    return {"kind": "keepkv", "host": asdict(layer.progress), "tally": tally, "attention": attention}


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
    known = {x.name for x in fields(Progress)} & entry["host"].keys()
    layer.progress = Progress(**{"settled": entry["host"]["seen"], **{name: entry["host"][name] for name in known}})
    layer.heard = layer.progress.seen
    counts: dict[str, Any] = {**entry["tally"], **groups["count"]}
    layer.tally = Tally(**counts)
    layer.score_state = groups["state"]
    if groups["store"]:
        layer.store.restore(groups["store"])
        part = next(iter(layer.store.parts()))
        layer.lazy_initialization(part.keys, part.values)
    if entry["attention"]:
        layer.attention = {**entry["attention"], "sink_logits": tensors.get("sinks")}
