"""What a layer may hold: the budget of its cache in slots per KV head, and whether that can be kept."""

from __future__ import annotations

import math
import warnings
from itertools import product

import torch
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
    # Every layer holds the protected spans.
    held = seen.new_zeros(()) if shared.spans is None else shared.spans.protected_tokens(seen)
    if settings.policy is not None and settings.policy.prompt and settings.budget.grows:
        mean = held + _mean(layer, seen - held).maximum(least(settings.method, seen - held))
    else:
        mean = _mean(layer, seen)
    if settings.budget.bytes is not None and layer.store.static_length is not None:
        mean = mean.clamp(max=layer.store.static_length - (settings.room or 0))
    most = allowed(settings.method, mean, seen, settings.budget.grows, info.rank, info.ranks, held)
    cap = settings.method.when.cap
    if cap is None or not settings.budget.grows:
        return most
    return most.minimum(most.new_full((), cap) - shared.coming).maximum(_least(layer))


def _mean(layer: Compressible, seen: Tensor) -> Tensor:
    """(B,) float64: slots per KV head that the budget holds in every layer, for rows of ``seen`` (B,) tokens.

    Where tokens share content in groups, or slots stay exact beside codes, a budget in bytes pays for as many of these
    as there may be, or for one with each slot, whichever leaves more: both are no less than what is needed.
    """
    budget, ranks = layer.shared.settings.budget, layer.info.ranks
    if budget.slots is not None:  # whatever one takes
        return budget.per_head(seen)
    one, rest = _slot_bytes(layer), _reserved(layer) + _between(layer)
    more = [] if budget.bytes is None and budget.share_of_bytes is None else _more(layer, seen)
    found = []
    for with_each in product((False, True), repeat=len(more)):
        each = sum(size for (size, _), apart in zip(more, with_each, strict=True) if apart)
        every = sum(size * int(count.sum()) for (size, count), apart in zip(more, with_each, strict=True) if not apart)
        found.append(budget.per_head(seen, one + ranks * each, rest + ranks * every, _density(layer, each)))
    return torch.stack(found).amax(0)


def _more(layer: Compressible, seen: Tensor) -> list[tuple[int, Tensor]]:
    """What some slots of a layer take beyond others: bytes, of every KV head, and how many do in each row at most,
    (B,)."""
    (several, of_group), (exact, of_slot), more = layer.store.groups, layer.store.exact_slots, []
    if several:
        # A group begins anew where a chunk does; slots that merge are written again, in groups of their own.
        count = (seen / several).ceil() * (1 + layer.shared.settings.method.reduce.merges) + 1
        more.append((of_group, count))
    if exact:
        more.append((of_slot, torch.full_like(seen, exact)))
    return more


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
        policy = layer.shared.settings.policy
        if policy is not None and policy.prompt:  # of a reply that has just begun any share is that little
            return
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
    exact, more = layer.store.exact_slots
    rest += min(exact, pinned) * more * layer.info.ranks * len(seen)
    raise BudgetError(
        f"budget of {asked}: one slot in every layer and head takes {one}, and {rest} {_rest(layer)}. What is left "
        f"holds fewer than {always}. Give at least {rest + pinned * one} bytes, or smaller sinks= and window= options. "
        f"{RESET}"
    )


def check_prompt(layer: Compressible) -> None:
    """Raises ``BudgetError`` where the prompt is to be kept, and it and the window are more than the budget holds:
    while it is read, not when the reply has become long."""
    shared = layer.shared
    settings, spans, seen = shared.settings, shared.spans, shared.positions.seen
    if spans is None or not spans.policy.prompt or spans.policy.on_overflow != "error" or spans.prompt is not None:
        return
    assert seen is not None
    if settings.budget.grows:
        return
    need = seen + (settings.method.window if settings.method.when.every is not None else 0)
    budget = _mean(layer, seen).floor().long()
    if not bool((over := need > budget).any()):
        return
    row, window = int(over.int().argmax()), int((need - seen)[0])
    beside = f" beside the {window} most recent ones" if window else ""
    raise BudgetError(
        f"row {row}: the {int(seen[row])} tokens of its prompt so far are kept{beside}, and a budget of "
        f"{settings.budget} was given, which is {int(budget[row])} in each head. Give at least "
        f"{int(need.max())} slots per head, or prompt=False. {RESET}"
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
        return ranks * (len(seen) * layer.store.row_bytes + layer.store.protected_bytes(_protected(layer)))
    if settings.budget.bytes is None:
        return 0
    plain, rows = layer.store.slot_bytes().plain, len(seen)
    stays = settings.method.when.recurs or layer.shared.observing or layer.progress.prefilling
    state = allocated(x for name, x in layer.score_state.items() if stays or name.startswith("span_"))
    state += rows * layer.store.row_bytes + layer.store.protected_bytes(_protected(layer))
    return ranks * state + stock_bytes(layer.shared.others, plain, rows)


def _protected(layer: Compressible) -> Tensor:
    """(B,) int64: tokens of protected spans that the budget pays for."""
    spans, seen, budget = layer.shared.spans, layer.shared.positions.seen, layer.shared.settings.budget
    assert seen is not None
    if spans is None or (spans.policy.prompt and budget.grows):  # where a share is one of the reply
        return torch.zeros_like(seen)
    return spans.protected_tokens(seen)


def _between(layer: Compressible) -> int:
    """Bytes of a budget in bytes for what comes between two compressions: tokens, which are not encoded at once, and
    the latest query, which the score has still to see."""
    room, seen, sizes = layer.shared.settings.room, layer.shared.positions.seen, layer.store.slot_bytes()
    if room is None or seen is None:
        return 0
    query = sizes.plain * layer.progress.query_heads // (2 * layer.store.lengths.shape[1])  # as wide as a key
    one = room * (sizes.plain + sizes.beside + _weights(layer)) + query * layer.shared.settings.method.score.observes
    return one * len(seen) * layer.info.ranks
