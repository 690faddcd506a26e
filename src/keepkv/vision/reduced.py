"""Prompts with fewer vision tokens, and one budget for reducers and methods alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keepkv.core.budget import Budget
from keepkv.core.tokens import VIDEO
from keepkv.engine.places import telling
from keepkv.engine.versions import CACHE
from keepkv.errors import BudgetError, KeepKVError, UnsupportedInput
from keepkv.video.family import Sectioned
from keepkv.vision.reducers import REDUCERS
from keepkv.vision.seeing import Seeing, Seen
from keepkv.vision.tower import observe


def effective_entries(nominal: float, vision: int, text: int, layers: int = 1, whole: int = 0) -> float:
    """Mean cached entries per layer where ``nominal`` of the vision tokens stay beside all text, in all layers but the
    first ``whole``, which keep everything: what a budget of a reducer, or of FastV, comes to."""
    every = vision + text
    return (whole * every + (layers - whole) * (int(nominal * vision) + text)) / layers


def vision_tokens(budget: Budget | float | int | str, vision: int, text: int) -> int:
    """How many of the ``vision`` tokens a reducer leaves beside all ``text``, so that as many entries are cached in
    every layer as a method on the cache keeps with ``budget``. Raises ``BudgetError`` where the text leaves no room."""
    asked = Budget.of(budget)
    if asked.bytes is not None:
        raise KeepKVError(f"budget of {asked}: a reducer counts tokens; give a share of them, or a number")
    slots = int(asked.rate() * (vision + text) + 1e-9) if asked.grows else int(asked.slots or 0)
    if slots <= text:
        raise BudgetError(
            f"budget of {asked}: of {vision + text} tokens that is {slots} in every layer, and the {text} of text all "
            f"stay with a reducer, which leaves none for what is seen. Give at least {text + 1} tokens."
        )
    return min(vision, slots - text)


def shares(total: int, steps: int) -> list[int]:
    """``total`` over ``steps`` as evenly as can be; what is left goes to steps evenly spread."""
    return [(i + 1) * total // steps - i * total // steps for i in range(steps)]


@torch.no_grad()
def read_reduced(
    model: Any, cache: Any, ids: Sequence[int], seen: Seen, seeing: Seeing, name: str, count: int
) -> tuple[Tensor, Tensor]:
    """Feed one prompt of which the reducer ``name`` leaves ``count`` vision tokens, shared evenly by its steps.

    Returns the mask (1,T') of what was fed, and which of the prompt's tokens (T',) it stands for. Text, and with M-RoPE
    every kept vision token, stand where they did in the whole prompt; other models count what is left, as published.
    """
    if cache.settings.method.name != "full":
        raise KeepKVError(
            f"method {cache.settings.method.name!r}: a reduced prompt is read by the method 'full'; its budget is spent"
        )
    whole = isinstance(seeing.family, Sectioned)
    if whole and bool(seen.vision[0, -1]):  # what comes next counts on from its place, which may be gone
        raise UnsupportedInput("a prompt that ends in a picture cannot be reduced: put some text behind it")
    steps = observe(model, seeing, seen.pixels)
    places = seen.vision[0].nonzero()[:, 0].split(seeing.cells)
    features, kept = [], []
    for one, where, room in zip(steps, places, shares(count, len(steps)), strict=True):
        if room:
            made, index = REDUCERS[name](one.features, one.attention, one.keys, room)
            features.append(made)
            kept.append(where[index])
    stays = ~seen.vision[0]
    vision_at = torch.cat(kept)
    stays[vision_at] = True
    index = stays.nonzero()[:, 0]
    tokens = torch.tensor([list(ids)], device=index.device)
    embedded = model.get_input_embeddings()(tokens)
    embedded[0, vision_at] = torch.cat(features).to(embedded.dtype)
    kinds = (seen.vision * VIDEO)[:, index]
    begins = kinds.bool() & torch.isin(index, torch.stack([part[0] for part in kept]))[None]
    at = seen.places[..., index] if whole else torch.arange(len(index), device=index.device)[None]
    mask = torch.ones(1, len(index), dtype=torch.int64, device=index.device)
    with telling(cache, kinds, begins):
        model(
            inputs_embeds=embedded[:, index], attention_mask=mask, position_ids=at, use_cache=True, logits_to_keep=1,
            **{CACHE: cache},
        )  # fmt: skip
    return mask, index
