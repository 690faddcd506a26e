"""What happens when a forward begins: earlier ones are checked and settled, and the new columns are counted."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers.cache_utils import CacheLayerMixin

from keepkv.engine import cap
from keepkv.engine.compression import compress_waiting
from keepkv.engine.layer import Layer
from keepkv.engine.mask_rule import MaskRule
from keepkv.engine.state import CacheState
from keepkv.engine.versions import holds_nothing, in_prefill
from keepkv.errors import CacheStateError, UnsupportedInput


class Reads(Protocol):
    """What a forward begins on: a cache."""

    layers: list[Any]
    shared: CacheState

    @property
    def compressible(self) -> tuple[Layer, ...]: ...


def begin(cache: Reads, rule: MaskRule) -> None:
    """A forward over ``rule`` begins. A second mask of the same forward changes nothing; nor does one that is refused.

    Raises ``CacheStateError`` where an earlier forward ended midway, ``UnsupportedInput`` where the mask does not
    continue what was read.
    """
    batch, _, length, _ = rule.shape
    shared, positions = cache.shared, cache.shared.positions
    unfinished = _unfinished(cache)
    if unfinished:  # announced before, but no layer has seen it
        shared.take_back(unfinished)
    spans, device = shared.spans, torch.device(rule.arguments["device"])
    if spans is not None:
        spans.check(batch)
    positions.check(batch, length, rule.padding)
    _hide(cache, rule)
    reading = _reads(cache, length)
    prefilling = reading and not _verifies(cache)
    ends = None if spans is None or prefilling else positions.seen
    if spans is not None and ends is not None:
        spans.check_prompt(ends)
    if unfinished != length:
        full = cap.full(cache.compressible, rule)
        _settle(cache, reading, prefilling, full)
        cap.check(cache.compressible, rule, full)
        shared.forwards += 1
    if spans is not None and ends is not None:
        spans.end_prompt(ends)
    positions.begin(batch, length, rule.padding, device)
    shared.feed(length, decoded=not prefilling)
    if spans is not None:
        spans.begin(batch, device)


def _verifies(cache: Reads) -> bool:
    """Whether several tokens are a verification rather than a prompt: with rollback on, unless they are the first."""
    return any(layer.progress.record_past and layer.progress.seen for layer in cache.compressible[:1])


def _reads(cache: Reads, length: int) -> bool:
    """Whether a forward of ``length`` columns reads a prompt, its last chunk perhaps, rather than a decoded token."""
    if length > 1:
        return True
    compiled = any(layer.store.compileable and not layer.store.holds_all for layer in cache.compressible)
    return not compiled and (cache.shared.reading or in_prefill())


def _unfinished(cache: Reads) -> int:
    """Columns that were announced and that no layer has seen. Raises where some layers have, and others have not."""
    shared = cache.shared
    held = [x for x in cache.layers if isinstance(x, CacheLayerMixin) and not holds_nothing(x)]
    lengths = {int(x.get_seq_length()) for x in held if x.is_initialized or isinstance(x, Layer)}
    unfinished = shared.positions.columns - max(lengths, default=0)
    if unfinished:
        whole = all(at < shared.forwards for at in shared.begun.values())
    else:
        # One token is written into a recurrent state in place by some models: its end is not seen.
        latest = shared.positions.positions
        stamps = {} if latest is not None and latest.shape[1] == 1 else shared.ended
        whole = all(stamps.get(layer, at) == at == shared.forwards for layer, at in shared.begun.items())
    if len(lengths) > 1 or not whole:
        raise CacheStateError(
            "an earlier forward failed midway, and some layers have its tokens and others have not; call cache.reset()"
        )
    return unfinished


def _hide(cache: Reads, rule: MaskRule) -> None:
    """Take for padding what the mask hides of the newest tokens: those of rows that had ended, say."""
    shared, positions, layers = cache.shared, cache.shared.positions, cache.compressible
    if (found := positions.hidden(rule.padding)) is None:
        return
    column, tokens = found
    if any(column < layer.progress.settled or column < layer.heard for layer in layers):
        raise UnsupportedInput(
            "the attention mask hides tokens that a compression has seen, or that the score of the method has taken "
            "into account. Hide them before, or feed rows that end early in a batch of their own (cache.split)."
        )
    assert positions.seen is not None
    for layer in layers:
        layer.store.hide(positions.seen - tokens)
    shared.hide(tokens)


def _settle(cache: Reads, reading: bool, prefilling: bool, full: list[bool] | None) -> None:
    """Run what is due before a forward. reading: of more than one decoded token; prefilling: of a prompt; full: rows
    that it would take past the cap."""
    shared, layers, every = cache.shared, cache.compressible, cache.shared.settings.method.when.every
    for layer in layers:
        layer.listen()
    over = [every is not None and n >= every for n in shared.decoded]
    over = over if full is None else [a or b for a, b in zip(over, full, strict=True)]
    seen = shared.positions.seen
    due = torch.tensor(over, device=seen.device) if any(over) and seen is not None else None
    waited = [layer.progress.pending for layer in layers]
    for layer in layers:
        layer.compress_if_due(prefilling, due)
    compress_waiting(shared, None if any(waited) else due)
    ran = [was and not layer.progress.pending for was, layer in zip(waited, layers, strict=True)]
    if any(ran):
        shared.restart()
    elif due is not None and shared.compressing:
        shared.decoded = [0 if hit else n for hit, n in zip(over, shared.decoded, strict=True)]
    for layer in layers:
        layer.begin_step(reading)
