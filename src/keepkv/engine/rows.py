"""Rows that join a batch and leave it: continuous batching over slots of different lengths."""

from __future__ import annotations

import copy as copying
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from keepkv.core.budget import Budget
from keepkv.core.calibration import digests
from keepkv.core.slots import EMPTY
from keepkv.engine.compression import compress, compress_waiting, end_prompt
from keepkv.engine.layer import Layer
from keepkv.engine.state import CacheParts, CacheState, Settings
from keepkv.engine.stock_layers import free_past
from keepkv.engine.versions import holds_nothing
from keepkv.engine.view import view_of
from keepkv.errors import CacheStateError, UnsupportedModel
from keepkv.methods.apply import close_gaps


def join(cache: CacheParts, other: CacheParts) -> None:
    """Add the rows of ``other`` to ``cache``; see ``Cache.join``. Raises, and changes nothing, where they differ."""
    mine, theirs = cache.shared, other.shared
    if theirs.positions.seen is None:
        raise CacheStateError("the cache that joins has read nothing yet: feed its prompt first")
    settings = _joined_settings(cache, other)
    if mine.recorder is not None or theirs.recorder is not None:
        raise CacheStateError(
            "a cache that is recorded was joined with another, whose past the record does not know. Record and replay "
            "them apart, and join the records: keepkv.training.joined([…])"
        )
    cache.renew()
    other.renew()
    if mine.positions.seen is None:  # an empty batch takes over what comes
        cache.shared, cache.layers, other.shared, other.layers = theirs, other.layers, mine, cache.layers
        return
    for layer in (*cache.layers, *other.layers):
        if isinstance(layer, Layer):
            layer.listen()
    if any(type(layer) not in (Layer, DynamicSlidingWindowLayer) for layer in cache.layers if _holds(layer)):
        kinds = sorted({type(layer).__name__ for layer in cache.layers} - {"Layer"})
        raise UnsupportedModel(f"layers of kind {', '.join(kinds)} cannot be joined; decode these caches one by one")
    if any(isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers):
        _check_gaps(mine, theirs)
    if settings.method.score.needs_questions and _remembered(cache) != _remembered(other):
        raise CacheStateError(
            "of the caches that join one rehearsed questions and the other did not: call keepkv.rehearse on both"
        )
    for one in (cache, other):
        _check_prompt(one)
    for one in (cache, other):
        _compress_prompt(one)
        if one.shared.positions.gaps:
            _close_gaps(one)
    counts = (len(mine.positions.seen), len(theirs.positions.seen))
    mine.positions.join(theirs.positions)
    for layer, more in zip(cache.layers, other.layers, strict=True):
        if isinstance(layer, Layer):
            _join_layer(layer, more, counts, mine.positions.columns)
        elif _holds(layer):
            _join_sliding(layer, more, mine.positions.columns)
    mine.decoded, mine.fed = mine.decoded + theirs.decoded, []
    mine.settings = settings
    if mine.spans is not None and theirs.spans is not None:
        mine.spans.join(theirs.spans)
        mine.settings = replace(settings, policy=mine.spans.policy)
    other.reset()


def split(cache: Any, which: Sequence[int]) -> Any:
    """The rows ``which`` of ``cache`` as a cache of their own; see ``Cache.split``."""
    shared, seen = cache.shared, cache.shared.positions.seen
    count = 0 if seen is None else len(seen)
    wrong = [row for row in which if not 0 <= row < count]
    if wrong or not which or len(set(which)) < len(which):
        raise CacheStateError(f"split({list(which)}): give different rows out of 0 to {count - 1}, one at least")
    check_movable(cache)
    budget = shared.settings.budget
    rest = [row for row in range(count) if row not in set(which)]
    twin = copying.copy(cache)
    twin.shared, twin.layers = replace(shared.copy(), others=[]), []
    rows = torch.tensor(which)
    for layer in cache.layers:
        if isinstance(layer, Layer):
            twin.layers.append(layer.copy(twin.shared, rows))
        else:
            twin.layers.append(copying.deepcopy(layer))
            if _holds(layer):
                twin.layers[-1].batch_select_indices(rows)
            twin.shared.others.append(twin.layers[-1])
    twin.shared.index(rows)
    if rest:
        cache.batch_select_indices(torch.tensor(rest))
        _trim(cache)
    else:
        cache.reset()
    _trim(twin)
    if budget.bytes is not None:
        for one, rows_left in ((cache, rest), (twin, which)):
            part = Budget(bytes=budget.bytes * len(rows_left) // count) if rows_left else budget
            one.shared.settings = replace(one.shared.settings, budget=part)
    return twin


def crop(cache: Any, tokens_to_remove: int) -> None:
    """Take back the newest columns; see ``Cache.crop``. Raises, and changes nothing, where a layer cannot."""
    if tokens_to_remove > 0:
        raise CacheStateError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
    shared, before = cache.shared, {}
    for layer in cache.layers:
        if isinstance(layer, Layer):
            layer.check_crop(-tokens_to_remove)
    for layer in cache.layers:
        if isinstance(layer, Layer) or holds_nothing(layer):
            continue
        before[layer] = dict(vars(layer))  # they crop by taking slices, and write to none
        try:
            layer.crop(tokens_to_remove)
            _check_window(layer)
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            for changed, state in before.items():
                vars(changed).update(state)
            kind = type(layer).__name__
            raise CacheStateError(f"crop({tokens_to_remove}): a {kind} cannot be cropped: {error}") from error
    for layer in cache.compressible:
        layer.crop(tokens_to_remove)
    for layer in before:
        free_past(layer)
    shared.take_back(-tokens_to_remove)
    if shared.spans is not None and shared.positions.seen is not None:
        shared.spans.crop(shared.positions.seen)


def _check_window(layer: Any) -> None:
    """Raise where a layer with a sliding window holds less than the next token may look at."""
    if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized:
        least, keys = min(layer.cumulative_length, layer.sliding_window - 1), layer.keys
        if keys is not None and keys.shape[2] < least:
            raise RuntimeError(f"{keys.shape[2]} tokens of its window of {least} would be left")


def copy_all(cache: Any) -> None:
    """Take copies of all that a cache holds, in memory that may be written in the mode that is on now."""
    shared = cache.shared
    shared.positions.__dict__.update(shared.positions.copy().__dict__)
    for layer in cache.layers:
        if isinstance(layer, Layer):
            layer.store = layer.store.clone()
            layer.score_state = {name: x.clone() for name, x in layer.score_state.items()}
        else:
            for name, x in vars(layer).items():
                if isinstance(x, Tensor):
                    setattr(layer, name, x.clone())
                elif isinstance(x, dict):
                    x.update({key: y.clone() for key, y in x.items() if isinstance(y, Tensor)})


def check_movable(cache: Any) -> None:
    """Raise where rows cannot be added or taken out: buffers of transformers' that have a fixed size."""
    for layer in cache.layers:
        if _holds(layer) and not hasattr(layer, "batch_select_indices"):
            raise UnsupportedModel(
                f"rows of a {type(layer).__name__} cannot be added or taken out: store='static' keeps layers with a "
                "sliding window in buffers of fixed size. Use store='dense'."
            )


def attention_mask(cache: Any, new: int) -> Tensor:
    """(B, columns + new) int64 for the next forward of ``new`` tokens; see ``Cache.attention_mask``."""
    positions = cache.shared.positions
    if positions.seen is None:
        raise CacheStateError("the cache has read nothing yet: its first mask is that of the prompt")
    mask: Tensor = positions.seen.new_ones(len(positions.seen), positions.columns + new)
    if positions.tokens is not None:
        mask[:, : positions.columns] = positions.tokens
    return mask


def _joined_settings(cache: CacheParts, other: CacheParts) -> Settings:
    """Those of the joined cache. Budgets in bytes add up, as many for each row; all else must be the same."""
    facts = [_facts(cache), _facts(other)]
    if different := [name for name, x in facts[0].items() if x != facts[1][name]]:
        raise CacheStateError(
            f"caches that differ in {', '.join(different)} were joined: rows decode as one batch only where they were "
            "made alike"
        )
    mine, theirs = cache.shared.settings, other.shared.settings
    if mine.budget.bytes is None or theirs.budget.bytes is None or cache.shared.positions.seen is None:
        return mine
    return replace(mine, budget=Budget(bytes=mine.budget.bytes + theirs.budget.bytes))


def _facts(cache: CacheParts) -> dict[str, Any]:
    """What must be the same of caches whose rows join."""
    shared, settings, seen = cache.shared, cache.shared.settings, cache.shared.positions.seen
    shares = settings.budget.bytes is not None and seen is not None  # rows share bytes evenly
    return {
        "model": cache.attached_config, "store": (cache.layout, cache.codec), "method": settings.method,
        "bytes for each row": Fraction(settings.budget.bytes or 0, len(seen)) if shares and seen is not None else None,
        "budget": None if shares else settings.budget, "seed": settings.seed,
        "span policy": settings.policy and replace(settings.policy, spans=()),
        "selection": settings.select, "calibration": digests(settings.calibrations), "compressing": shared.compressing,
    }  # fmt: skip


def _check_prompt(cache: CacheParts) -> None:
    """Raise what ``_compress_prompt`` would, before any layer of a cache has changed."""
    shared = cache.shared
    if shared.spans is not None and shared.positions.seen is not None:
        shared.spans.check_prompt(shared.positions.seen)
    if shared.compressing:
        end_prompt([x for x in cache.layers if isinstance(x, Layer) and x.progress.pending])


def _compress_prompt(cache: CacheParts) -> None:
    """Run what waits for the first decoded token, so that no row waits for another."""
    shared, when = cache.shared, cache.shared.settings.method.when
    layers = [x for x in cache.layers if isinstance(x, Layer)]
    if shared.spans is not None and shared.positions.seen is not None:
        shared.spans.end_prompt(shared.positions.seen)
    if not shared.compressing:
        return
    if any(layer.progress.pending for layer in layers):
        for layer in layers:
            if layer.progress.pending:
                compress(layer)
        compress_waiting(shared)
        shared.restart()
    if not when.recurs:
        for layer in layers:
            layer.drop_score_state()


def _close_gaps(cache: CacheParts) -> None:
    """Free the columns of padding between the tokens of a row, which rows that join do not share."""
    for layer in cache.layers:
        if isinstance(layer, Layer):
            view = view_of(layer)
            close_gaps(view)
            store = layer.store.successor()
            store.load(layer.form.stored(view.slots))
            layer.store = store


def _remembered(cache: CacheParts) -> set[str]:
    """Names of what the scores of a cache remember per row."""
    return {name for x in cache.layers if isinstance(x, Layer) for name in x.score_state}


def _join_layer(layer: Layer, other: Layer, counts: tuple[int, int], columns: int) -> None:
    layer.store.join(other.store)
    layer.tally.join(other.tally, counts)
    reduce, joined = layer.shared.settings.method.reduce, {}
    for name, like in {**other.score_state, **layer.score_state}.items():
        start = reduce.row_starts.get(name)
        halves = [
            x.score_state.get(name, _start(like, count, start)) for x, count in zip((layer, other), counts, strict=True)
        ]
        joined[name] = torch.cat(_padded(halves))
    layer.score_state = joined
    layer.progress.seen = layer.progress.settled = columns
    layer.progress.compressed = True  # the slots are no longer every column in order
    layer.progress.record_past |= other.progress.record_past


def _start(like: Tensor, rows: int, start: float | None) -> Tensor:
    """What a row holds of which nothing is known: zeros, or ``EMPTY`` in integer tensors, unless ``start`` says."""
    blank = like[:1].expand(rows, *like.shape[1:])
    return torch.full_like(blank, _blank(like) if start is None else start)


def _blank(x: Tensor) -> float:
    return 0.0 if x.is_floating_point() else float(EMPTY)


def _padded(halves: list[Tensor]) -> list[Tensor]:
    """The same sizes behind the rows: fewer remembered queries start with ones at position ``EMPTY``."""
    sizes = [max(pair) for pair in zip(*(x.shape[1:] for x in halves), strict=True)]
    wide = [x.new_full((len(x), *sizes), _blank(x)) for x in halves]
    for out, x in zip(wide, halves, strict=True):
        out[(slice(None), *(slice(size - n, None) for size, n in zip(sizes, x.shape[1:], strict=True)))] = x
    return wide


def _join_sliding(layer: Any, other: Any, columns: int) -> None:
    """Columns of a layer with a sliding window: the shorter ones are padding, which the mask hides."""
    held = min(columns, layer.sliding_window - 1)
    for name in ("keys", "values"):
        both = [x[:, :, max(0, x.shape[2] - held) :] for x in (getattr(layer, name), getattr(other, name))]
        setattr(layer, name, torch.cat([torch.nn.functional.pad(x, (0, 0, held - x.shape[2], 0)) for x in both]))
    layer.cumulative_length = columns


def _trim(cache: CacheParts) -> None:
    """Forget the columns in front of the longest row."""
    spare, columns = cache.shared.positions.trim(), cache.shared.positions.columns
    for layer in cache.layers:
        if isinstance(layer, Layer):
            layer.progress.seen -= spare
            layer.progress.settled = max(0, layer.progress.settled - spare)
            layer.heard = max(0, layer.heard - spare)
            layer.progress.compressed |= spare > 0
        elif isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized:
            held = min(columns, layer.sliding_window - 1)
            for name in ("keys", "values"):
                setattr(layer, name, getattr(layer, name)[:, :, max(0, getattr(layer, name).shape[2] - held) :])
            free_past(layer)
            layer.cumulative_length = columns


def _holds(layer: Any) -> bool:
    """Whether a layer that transformers keeps has anything of its own: layers that share slots have not."""
    return bool(getattr(layer, "is_initialized", True)) and not holds_nothing(layer)


def _check_gaps(*caches: CacheState) -> None:
    if any(bool(shared.positions.gaps) for shared in caches):
        raise CacheStateError(
            "a row has padding between its tokens (a second prompt was padded), and layers with a sliding window hold "
            "it: feed turns row by row where such caches are to be joined"
        )
