"""What a layer may hold: the budget of its cache in slots per KV head, and whether that can be kept."""

from __future__ import annotations

import math
import warnings

from torch import Tensor

from keepkv.engine.state import Compressible
from keepkv.engine.stock_layers import stock_bytes
from keepkv.errors import BudgetError
from keepkv.methods.allowance import allowed, least
from keepkv.store.base import allocated

RESET = "Call cache.reset() before using the cache again."


def layer_budget(layer: Compressible) -> Tensor:
    """(B,) int64: slots per KV head that ``layer`` may hold on average now."""
    info, shared = layer.info, layer.shared
    settings, seen = shared.settings, shared.positions.seen
    assert seen is not None
    mean = _mean(layer, seen)
    if settings.budget.bytes is not None and layer.store.static_length is not None:
        mean = mean.clamp(max=layer.store.static_length - (settings.room or 0))
    # Every layer holds the protected spans.
    held = 0 if shared.spans is None else shared.spans.protected_tokens(seen)
    most = allowed(settings.method, mean, seen, settings.budget.grows, info.rank, info.ranks, held)
    cap = settings.method.when.cap
    if cap is None or not settings.budget.grows:
        return most
    return most.minimum(most.new_full((), cap) - shared.coming).maximum(_least(layer))


def _mean(layer: Compressible, seen: Tensor) -> Tensor:
    """(B,) float64: slots per KV head that the budget holds in every layer, for rows of ``seen`` (B,) tokens.

    Where tokens share content in groups, a budget in bytes pays for all groups of a row, or for as many as it holds
    slots if these are fewer.
    """
    budget, ranks = layer.shared.settings.budget, layer.info.ranks
    one, rest = _slot_bytes(layer), _reserved(layer) + _between(layer)
    several, bytes_ = layer.store.groups
    if not several or (budget.bytes is None and budget.share_of_bytes is None):
        return budget.per_head(seen, one, rest, _density(layer))
    # A group begins anew where a chunk does; slots that merge are written again, in groups of their own.
    count = (seen / several).ceil() * (1 + layer.shared.settings.method.reduce.merges) + 1
    whole = budget.per_head(seen, one, rest + ranks * bytes_ * int(count.sum()), _density(layer))
    apart = budget.per_head(seen, one + ranks * bytes_, rest, _density(layer, bytes_))
    return whole.maximum(apart.minimum(count.double()))


def check(layer: Compressible, budget: Tensor, over: Tensor) -> None:
    """Look at rows that are ``over`` their ``budget``, both (B,): it may be less than what the method always keeps.

    Raises ``BudgetError`` then. A share is that little of a short prompt: there it warns.
    """
    asked, seen, method = layer.shared.settings.budget, layer.shared.positions.seen, layer.shared.settings.method
    assert seen is not None
    pinned = max(1, method.sinks + method.window)
    always = f"the {pinned} that {method.name!r} always keeps ({method.sinks} sinks + {method.window} recent)"
    little = asked.per_head(seen, density=_density(layer)) if asked.grows else budget
    if not bool((over & (little < _least(layer))).any()):
        return
    if asked.grows:
        short = math.ceil(pinned / asked.rate(_density(layer)))
        warnings.warn(
            f"budget of {asked}: in rows of fewer than {short} tokens that is below {always}, which are kept; "
            "cache.report() says what is held",
            stacklevel=2,
        )
        return
    if asked.bytes is None:
        raise BudgetError(
            f"budget of {asked}: of these the allocation gives layer {layer.info.index} fewer than {always}. Give "
            f"more, or an allocation that reserves {pinned} slots in each layer. {RESET}"
        )
    one, rest = _slot_bytes(layer) * len(seen), _reserved(layer) + _between(layer)
    raise BudgetError(
        f"budget of {asked}: one slot in every layer and head takes {one}, and {rest} {_rest(layer)}. What is left "
        f"holds fewer than {always}. Give at least {rest + pinned * one} bytes, or smaller sinks= and window= options. "
        f"{RESET}"
    )


def check_buffers(layer: Compressible) -> None:
    """Raises ``BudgetError`` where buffers of a fixed size do not fit a budget in bytes."""
    asked, capacity, seen = layer.shared.settings.budget, layer.store.static_length, layer.shared.positions.seen
    if asked.bytes is None or capacity is None or seen is None:
        return
    one, rest = _slot_bytes(layer) * len(seen), _reserved(layer)
    if capacity * one + rest > asked.bytes:
        raise BudgetError(
            f"budget of {asked}: the static store's buffers of {capacity} slots per head take {capacity * one}, and "
            f"{rest} {_rest(layer)}. Give store_options={{'capacity': N}}, N at most "
            f"{max(0, asked.bytes - rest) // one}. {RESET}"
        )


def exceeds(layer: Compressible) -> bool:
    """Whether ``layer`` takes more than its part of a budget in bytes, or of a share of them."""
    budget, seen, ranks, held = layer.shared.settings.budget, layer.shared.positions.seen, layer.info.ranks, layer.store
    assert seen is not None
    if budget.share_of_bytes is not None:
        return held.nbytes > budget.share_of_bytes * held.slot_bytes().plain * int(seen.sum())
    return budget.bytes is not None and held.nbytes * ranks > budget.bytes - _reserved(layer) - _between(layer)


def _rest(layer: Compressible) -> str:
    """What bytes go to that are not for slots."""
    said = "go to layers that are not compressed, to what the score remembers and to tokens between compressions"
    if layer.score_state and layer.progress.prefilling and not layer.shared.settings.method.when.recurs:
        said += " (nothing is remembered after a compression with When(prefill='deferred'))"
    return said


def _least(layer: Compressible) -> Tensor:
    """(B,) int64: slots of a head that are kept whatever the budget, one at least."""
    seen = layer.shared.positions.seen
    assert seen is not None
    return least(layer.shared.settings.method, seen)


def _slot_bytes(layer: Compressible) -> int:
    """Bytes of one slot in every layer and head, for one row."""
    sizes = layer.store.slot_bytes()
    return (sizes.content + sizes.beside + _weights(layer)) * layer.info.ranks


def _density(layer: Compressible, more: int = 0) -> float:
    """Bytes of a token in a plain cache, by those of a slot here and ``more``."""
    sizes = layer.store.slot_bytes()
    return sizes.plain / (sizes.content + sizes.beside + more)


def _weights(layer: Compressible) -> int:
    """Bytes of the attention of the latest token to one slot, where the score has still to see it."""
    follows = layer.shared.settings.room is not None and layer.shared.settings.method.score.follows_decode
    return 4 * layer.progress.query_heads if follows else 0


def _reserved(layer: Compressible) -> int:
    """Bytes of a budget in bytes that are not for slots, all layers taken to be like this one; of a share of the bytes,
    which is one of slots, what the slots of a row have in common."""
    settings, seen, ranks = layer.shared.settings, layer.shared.positions.seen, layer.info.ranks
    assert seen is not None
    if settings.budget.share_of_bytes is not None and layer.store.held.codec.exact is not None:
        return ranks * len(seen) * layer.store.row_bytes
    if settings.budget.bytes is None:
        return 0
    plain, rows = layer.store.slot_bytes().plain, len(seen)
    stays = settings.method.when.recurs or layer.shared.observing or layer.progress.prefilling
    state = allocated(x for name, x in layer.score_state.items() if stays or name.startswith("span_"))
    return ranks * (state + rows * layer.store.row_bytes) + stock_bytes(layer.shared.others, plain, rows)


def _between(layer: Compressible) -> int:
    """Bytes of a budget in bytes for what comes between two compressions: tokens, which are not encoded at once, and
    the latest query, which the score has still to see."""
    room, seen, sizes = layer.shared.settings.room, layer.shared.positions.seen, layer.store.slot_bytes()
    if room is None or seen is None:
        return 0
    query = sizes.plain * layer.progress.query_heads // (2 * layer.store.lengths.shape[1])  # as wide as a key
    one = room * (sizes.plain + sizes.beside + _weights(layer)) + query * layer.shared.settings.method.score.observes
    return one * len(seen) * layer.info.ranks
