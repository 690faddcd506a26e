"""Caches as files: safetensors with a checked header, never pickle."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from keepkv.core import tensorfile, wholefile
from keepkv.core.budget import Budget
from keepkv.core.calibration import Given, check_same, digests
from keepkv.core.tensorfile import Declared, Source
from keepkv.core.tokens import Tokens
from keepkv.core.when import When
from keepkv.engine.devices import input_device
from keepkv.engine.files import agreement, origin
from keepkv.engine.files.header import FORMAT, FORMER, checked
from keepkv.engine.fingerprint import shape
from keepkv.engine.layer import Layer
from keepkv.engine.model import set_attention
from keepkv.engine.state import CacheParts, Progress
from keepkv.engine.tally import Tally
from keepkv.engine.versions import holds_nothing
from keepkv.errors import CacheFileError, CacheStateError, CalibrationError, KeepKVError, UnsupportedModel
from keepkv.methods import METHODS, Method, make_method
from keepkv.select import SELECTIONS, Select
from keepkv.spans import SpanPolicy

Made = TypeVar("Made", bound=CacheParts)


@dataclass(frozen=True)
class Wanted:
    """How a cache is to be read; see ``Cache.load``."""

    method: Method | None = None
    calibration: Given = None
    strict: bool = True
    key: bytes | None = None
    max_bytes: int = tensorfile.MAX_FILE


# --- writing -----------------------------------------------------------------------------------------------------


def save(cache: CacheParts, path: Path, key: bytes | None) -> None:
    """Write ``cache`` to ``path``; see ``Cache.save``."""
    shared, settings = cache.shared, cache.shared.settings
    positions, spans, method = shared.positions, shared.spans, settings.method
    heads = any(isinstance(x, Layer) and x.store.held.codec.together for x in cache.layers)
    named = make_method(method.name, method.options) if method.name in METHODS else method
    if method not in (named, replace(named, together=heads)):
        raise CacheStateError(
            f"the method of this cache has the name {method.name!r} and other pieces: a file would load as the method "
            "of that name. Give it a name of its own: dataclasses.replace(method, name='mine')."
        )
    if len(cache.layers) != cache.made:
        raise CacheStateError(
            f"the model added {len(cache.layers) - cache.made} layers to this cache while it read, which a loaded one "
            "would not have; such a cache cannot be saved"
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
    if positions.known is not None:
        tensors |= {"clock.runs": positions.known.at, "clock.facts": positions.known.facts}
    tensors |= {} if spans is None else {f"spans.{name}": x for name, x in spans.tensors().items()}
    tensors = {name: x.detach().cpu() for name, x in tensors.items()}
    header = {
        "model": cache.attached_config,
        "origin": cache.origin.facts(),
        "method": method.name,
        "options": {k: asdict(v) if isinstance(v, When) else v for k, v in method.options.items()},
        "budget": settings.budget.value,
        "seed": settings.seed,
        "store": [cache.layout, cache.store_options],
        "codec": [cache.codec, cache.codec_options],
        "calibrations": digests(settings.calibrations),
        "select": None if settings.select is None else _selection(settings.select),
        "compressing": shared.compressing,
        "spans": None if spans is None else spans.policy.to_dict(),
        "columns": positions.columns,
        "decoded": shared.decoded,
        "fed": shared.fed,
        "layers": layers,
    }
    if (asked := shared.asked) is not None and asked != settings:
        header["asked"] = {"budget": asked.budget.value, "spans": asked.policy and asked.policy.to_dict()}
    try:
        text = json.dumps(header, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CacheStateError(f"the options of method {method.name!r} cannot be written to a file: {error}") from error
    try:  # as they will be read: a file that would be refused is not written
        read_again = checked(FORMAT, json.loads(text), 0, True)
        declared = {name: Declared(x.dtype, tuple(x.shape), 0) for name, x in tensors.items()}
        agreement.check_shapes(cache, read_again, declared)
        agreement.check_contents(cache, read_again, tensors)
    except ValueError as error:
        raise CacheStateError(f"the cache cannot be saved: {error}") from error
    try:
        tensorfile.write(path, FORMAT, text, tensors, key)
    except (OSError, ValueError) as error:
        raise CacheFileError(f"cannot write {str(path)!r}: {wholefile.reason(error)}") from error


def _selection(select: Select) -> list[Any]:
    if (name := SELECTIONS.name_of(select)) is None:
        raise CacheStateError(f"{type(select).__name__} cannot be written to a file: register it with register_select")
    return [name, select.options()]


def _layer_tensors(layer: Any) -> dict[str, Tensor]:
    if isinstance(layer, Layer):
        groups = {"store": layer.store.tensors(), "state": layer.score_state, "count": layer.tally.tensors()}
        sinks = (layer.attention or {}).get("sink_logits")
        named = {f"{group}.{name}": x for group, held in groups.items() for name, x in held.items()}
        return named if sinks is None else {**named, "sinks": sinks.detach()}
    kept = isinstance(layer, (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer))
    if holds_nothing(layer) or (kept and not layer.is_initialized):
        return {}
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return {"keys": layer.keys, "values": layer.values}
    raise CacheStateError(
        f"a cache with a layer of kind {type(layer).__name__} cannot be saved; only attention layers can, and with "
        "store='static' only those without a sliding window"
    )


def _layer_header(layer: Any) -> dict[str, Any]:
    if not isinstance(layer, Layer):
        length = getattr(layer, "cumulative_length", 0)
        recording = getattr(layer, "record_past", False)
        return {"kind": type(layer).__name__, "cumulative_length": int(length), "record_past": recording}
    attention = {k: v for k, v in (layer.attention or {}).items() if k != "sink_logits"}
    tally = {name: getattr(layer.tally, name) for name in ("compressions", "overflows", "seconds")}
    return {"kind": "keepkv", "host": asdict(layer.progress), "tally": tally, "attention": attention}


# --- reading -----------------------------------------------------------------------------------------------------


def load(make: Callable[..., Made], path: Path, model: PreTrainedModel, wanted: Wanted) -> Made:
    """Read a cache; see ``Cache.load``. A file that is refused leaves the model as it was."""
    made: list[tuple[Made, dict[str, Any]]] = []  # by ``inspect``, which runs before any tensor is read

    def inspect(format: str, given: Any, declared: Mapping[str, Declared]) -> None:
        seen = declared.get("clock.seen")
        rows = seen.shape[0] if seen is not None and seen.shape else 0
        header = checked(format, given, rows, "clock.tokens" in declared)
        _compare(header, model, wanted.strict, path)
        cache = _build(make, header, model, wanted, path)
        agreement.check_shapes(cache, header, declared, model)
        made.append((cache, header))

    source = Source([FORMAT, FORMER], "a cache", CacheFileError, wanted.key, wanted.max_bytes, inspect)
    before = model.config.get_text_config(decoder=True)._attn_implementation
    try:
        with _refused(path):
            format, _, tensors = tensorfile.read(path, source)
            cache, header = made[0]
            agreement.check_contents(cache, header, tensors, former=format == FORMER)
            _restore(cache, header, tensors, input_device(model))
            agreement.check_restored(cache)
    except KeepKVError:
        set_attention(model, before)
        raise
    return cache


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Whatever a file brings about is the file's fault, and said as that."""
    try:
        yield
    except (CacheFileError, CalibrationError, UnsupportedModel):
        raise
    except (KeepKVError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CacheFileError(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _compare(header: dict[str, Any], model: PreTrainedModel, strict: bool, path: Path) -> None:
    """Raise ``CacheFileError`` where the file is of another model; warn of what is allowed, and what is unknown."""
    found = origin.compare((header["model"], shape(model)), (header["origin"], origin.facts(model)))
    if found.sizes:
        raise CacheFileError(f"{path}: saved from another model; (file, given) differ in {found.sizes}")
    if found.meaning and strict:
        raise CacheFileError(
            f"{path}: saved from another model, or from this one in another state; (file, given) differ in "
            f"{found.meaning}. Load it into the model that filled it, or take it as it is with strict=False."
        )
    if found.meaning:
        warnings.warn(f"{path}: loaded into another model: (file, given) differ in {found.meaning}", stacklevel=7)
    if found.unread is not None:
        warnings.warn(f"{path}: not compared with the model: {found.unread}", stacklevel=7)


def _build(
    make: Callable[..., Made], header: dict[str, Any], model: PreTrainedModel, wanted: Wanted, path: Path
) -> Made:  # fmt: skip
    """An empty cache with the settings of ``header``."""
    method = wanted.method
    if method is None and header["method"] not in METHODS:
        raise CacheFileError(
            f"{path}: made with method {header['method']!r}, which is not registered here; register it, or pass it as "
            "keepkv.Cache.load(path, model, method=…)"
        )
    with _refused(path):
        if method is None:
            options = {k: When(**v) if k == "when" and isinstance(v, dict) else v for k, v in header["options"].items()}
            method = make_method(header["method"], options)
        (layout, mine), (codec, its) = header["store"], header["codec"]
        select, chosen = header.get("select") or (None, {})
        cache = make(
            model, method, header["budget"], seed=header["seed"], calibration=wanted.calibration,
            spans=SpanPolicy.from_dict(header["spans"]) if header["spans"] else None,
            store=layout, codec=codec, store_options=mine, codec_options=its, select=select, select_options=chosen,
        )  # fmt: skip
    check_same(header["calibrations"], cache.shared.settings.calibrations, path)
    kinds = [entry["kind"] for entry in header["layers"]]
    if kinds != [_layer_header(layer)["kind"] for layer in cache.layers]:
        raise CacheFileError(f"{path}: its layers are not those of the model: {kinds}"[:300])
    return cache


# --- what a file gives back --------------------------------------------------------------------------------------


def _restore(cache: CacheParts, header: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    """Give an empty cache what the file holds; all of it was checked."""
    shared, positions = cache.shared, cache.shared.positions
    shared.compressing, shared.decoded = header["compressing"], header["decoded"]
    shared.fed = header.get("fed", [])
    if "asked" in header:
        budget, spans = Budget.of(header["asked"]["budget"]), header["asked"]["spans"]
        policy = None if spans is None else SpanPolicy.from_dict(spans)
        if (policy is None) != (shared.settings.policy is None):
            raise ValueError("asked.spans is not what spans is")
        shared.asked = replace(shared.settings, budget=budget, policy=policy)
    positions.columns = header["columns"]
    positions.columns_tensor = torch.tensor(header["columns"], device=device)
    named: dict[str, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        group, _, rest = name.partition(".")
        named.setdefault(group, {})[rest] = x.to(device)
    if "clock" in named:
        clock = named["clock"]
        positions.seen, positions.positions, positions.tokens = clock["seen"], clock["positions"], clock.get("tokens")
        positions.offsets = clock.get("offsets")
        positions.known = Tokens(clock["runs"], clock["facts"]) if "runs" in clock else None
        if positions.tokens is None and bool((positions.seen < positions.columns).any()):  # a file of before
            positions.padded_on_the_left(positions.columns)
    if shared.spans is not None:
        shared.spans.restore(named.get("spans", {}))
    for i, (layer, entry) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        _restore_layer(layer, entry, named.get(str(i), {}))


def _restore_layer(layer: Any, entry: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if not isinstance(layer, Layer):
        if tensors:
            layer.lazy_initialization(tensors["keys"], tensors["values"])
            layer.keys, layer.values = tensors["keys"], tensors["values"]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = entry["cumulative_length"]
            if entry["record_past"]:
                layer.activate_past_recording()
        return
    groups: dict[str, dict[str, Tensor]] = {"store": {}, "state": {}, "count": {}}
    for name, x in tensors.items():
        if name != "sinks":
            group, rest = name.split(".", 1)
            groups[group][rest] = x
    layer.progress = Progress(**entry["host"])
    layer.heard = layer.progress.seen
    counts: dict[str, Any] = {**entry["tally"], **groups["count"]}
    layer.tally = Tally(**counts)
    layer.score_state = groups["state"]
    if groups["store"]:
        layer.store.restore(groups["store"])
        if layer.store.length:
            layer.lazy_initialization(*layer.store.like())
    if entry["attention"]:
        layer.attention = {**entry["attention"], "sink_logits": tensors.get("sinks")}
