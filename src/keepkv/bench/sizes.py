"""Bytes of caches before they exist: which batch fits a cap, and whether a row fits the memory at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from keepkv.bench.systems import QUANTISED, System, slots_asked
from keepkv.core.budget import Budget
from keepkv.errors import KeepKVError
from keepkv.methods.base import METHODS, Method, own_options
from keepkv.store import CODECS, Held, choose, settled
from keepkv.store.base import VOTES
from keepkv.store.ragged import SEGMENT, SHARED
from keepkv.store.zones import SLACK

GROUP, RECENT = 64, 128  # of transformers' quantised caches: values that share a scale, tokens in full precision


@dataclass(frozen=True)
class Geometry:
    """What a cache of a model consists of. heads: KV heads; width: numbers in a key and a value together."""

    layers: int
    heads: int
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> Geometry:
        """Raises for models whose layers do not all attend to every token, one key and value per head."""
        text = config.get_text_config(decoder=True)
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or getattr(text, "kv_lora_rank", None) or getattr(text, "sliding_window", None):
            raise KeepKVError(
                f"{type(text).__name__} has layers other than full attention: the bytes of its cache are not computed "
                "beforehand. Give --batch instead of --cap."
            )
        query = text.num_attention_heads
        head = getattr(text, "head_dim", None) or text.hidden_size // query
        return cls(text.num_hidden_layers, getattr(text, "num_key_value_heads", query), 2 * head, dtype)

    @property
    def token(self) -> int:
        """Bytes of one token in a plain cache."""
        return self.layers * self.heads * self.width * self.dtype.itemsize


def row_bytes(geometry: Geometry, system: System, context: int, new: int) -> int:
    """Bytes that one row holds after ``context`` tokens were read and ``new`` decoded, positions, votes, statistics and
    slack included; of what adapts its budget to heads or layers, on average."""
    if system.library == "keepkv":
        return _keepkv_bytes(geometry, system, context, new)
    if system.library == "kvpress":
        masked = system.method == "adakv"  # what it removes is masked and stays
        slots = context if masked else slots_asked(system.budget, context)
        return geometry.token * (slots + new)
    if system.method == "plain":
        return geometry.token * (context + new)
    bits = QUANTISED[system.method][1]
    if bits is None:
        return geometry.layers * geometry.heads * geometry.width * (context + new)
    numbers, scales = geometry.width * bits / 8, 2 * geometry.width / GROUP * geometry.dtype.itemsize
    packed = geometry.layers * geometry.heads * (numbers + scales) * (context + new)
    return round(packed) + geometry.token * min(RECENT, new)


def _keepkv_bytes(geometry: Geometry, system: System, context: int, new: int) -> int:
    try:
        method: Method = METHODS.build(system.method, **own_options(system.options))
    except TypeError as error:
        raise KeepKVError(f"method {system.method!r}: {error}") from error
    full = method.when.prefill is None and method.when.every is None
    pinned = min(context, method.sinks + method.window)
    slots = context if full else max(pinned, slots_asked(system.budget, context))
    new = new if method.when.every is None else min(new, method.when.every)
    if method.when.cap is not None:
        slots = min(slots, method.when.cap)
        new = min(new, method.when.cap - slots)
    item, width = geometry.dtype.itemsize, geometry.width
    beside = Held(dict.fromkeys(method.score.stats, 0.0), votes=method.reduce.merges).beside
    layout, name = choose(system.store or method.store, system.options.get("codec", "none"), method.allocate.ragged)
    name, own = settled(name, system.options.get("codec_options", {}), Budget.of(system.budget or 1.0))
    codec = CODECS.build(name, **own)
    exact, encoded = width * item + beside, codec.slot_bytes(width // 2, width - width // 2, geometry.dtype) + beside
    if layout == "static":
        capacity: int = system.store_options.get("capacity", 4096)
        return geometry.layers * geometry.heads * capacity * (exact + VOTES)
    if layout not in ("dense", "ragged"):
        raise KeepKVError(f"store {layout!r}: what it takes is not computed beforehand. Give --batch instead of --cap.")
    if codec.exact is not None:
        recent = min(new, 2 * codec.exact)  # tokens that are not encoded yet
        shared = codec.row_bytes(1, width // 2, width - width // 2, geometry.dtype)
        coded = slots + new - recent
        shared *= min(coded, -(-(context + new) // codec.grouped)) if codec.grouped else 1
        mine = grown(0, recent) * exact + coded * encoded + shared
    else:
        mine = (grown(slots, new) if layout == "dense" else slots + grown(0, new)) * exact
    mine += (SEGMENT + SHARED * (codec.exact is None)) * (layout == "ragged")
    return geometry.layers * geometry.heads * mine


def grown(slots: int, new: int) -> int:
    """Columns that a dense store of ``slots`` has allocated after ``new`` tokens."""
    capacity = slots
    for length in range(slots, slots + new):
        if length + 1 > capacity:
            capacity = length + 1 + (max(SLACK, length // 16) if length else 0)
    return capacity


def read_cap(text: str, geometry: Geometry, context: int, new: int) -> int:
    """Bytes of a cap: ``256MiB``, or ``plain@2``, what the plain cache takes at batch 2."""
    kind, at, batch = text.partition("@")
    if kind == "plain" and at and batch.isdecimal() and int(batch) > 0:
        return geometry.token * (context + new) * int(batch)
    try:
        cap = Budget.of(text).bytes
    except KeepKVError:
        cap = None
    if cap is None:
        raise KeepKVError(f"cap {text!r}: expected bytes such as '256MiB', or 'plain@N', the plain cache at batch N")
    return cap


def largest_batch(cap: int, row: int) -> int:
    """Rows of ``row`` bytes that fit ``cap`` bytes; raises where not even one does."""
    if row > cap:
        raise KeepKVError(
            f"one row takes {row:,} bytes, more than the cap of {cap:,}: give a larger cap or a smaller budget"
        )
    return cap // row
