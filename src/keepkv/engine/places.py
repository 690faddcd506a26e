"""What a forward says of its tokens, heard on its way in: their rotary positions, and which of them are vision.

A model with M-RoPE turns the key of a token by three positions of its own, and any model may be given others than the
index: what the decoder is given is what its rotary module gets. Placeholders among the ids tell images and videos from
text. ``RowPositions`` keeps both, see ``core.tokens``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from keepkv.core.rope import AXES
from keepkv.core.tokens import IMAGE, KIND, TEXT, VIDEO, Coming
from keepkv.engine.layer import is_ours
from keepkv.engine.positions import RowPositions
from keepkv.engine.versions import cache_in
from keepkv.errors import UnsupportedInput

_HOOKS = "keepkv_places"
_IDS = {"image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_id": VIDEO, "video_token_index": VIDEO}


def follow_places(model: Any) -> None:
    """Let caches hear what the forwards of ``model`` say of their tokens; does nothing the second time."""
    for module, hear in ((model.base_model, _hear_kinds), (_decoder(model), _hear_places)):
        hooks = module.__dict__.setdefault(_HOOKS, {})
        if hear.__name__ not in hooks:
            hooks[hear.__name__] = module.register_forward_pre_hook(hear, with_kwargs=True)


def unfollow_places(model: Any) -> None:
    """Undo ``follow_places``."""
    for module in (model.base_model, _decoder(model)):
        for hook in module.__dict__.pop(_HOOKS, {}).values():
            hook.remove()


@contextmanager
def telling(cache: Any, kinds: Tensor, starts: Tensor | None = None) -> Iterator[None]:
    """Inside, the tokens of a forward on ``cache`` are of ``kinds`` (B,T), and time steps begin where ``starts`` (B,T)
    says, whatever their ids are."""
    positions: RowPositions = cache.shared.positions
    positions.told = Coming(kinds=kinds, starts=starts)
    try:
        yield
    finally:
        positions.told = None


def text_places(cache: Any, mask: Tensor, count: int) -> Tensor:
    """Position ids (B,count) of the newest ``count`` columns of ``mask`` (B, all columns), which are text behind what
    ``cache`` has read: behind an image a model with M-RoPE counts on from a smaller number than the token's index."""
    at = (mask.cumsum(-1) - 1)[:, -count:].clamp_min(0)
    if not is_ours(cache) or (ahead := cache.shared.positions.ahead()) is None:
        return at
    moved: Tensor = at + ahead.to(at)
    return moved


def text_of(cache: Any, input_ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The text (n,) of each row of ``input_ids`` (B,T), which ``cache`` has read with ``mask`` (B,T): placeholders of
    images and videos cannot be read again as they stand. Raises ``UnsupportedInput`` where a row has none."""
    known, rows = cache.shared.positions.known, []
    for i, (ids, real) in enumerate(zip(input_ids, mask.bool(), strict=True)):
        row = ids[real]
        if known is not None:
            at = torch.arange(len(row), device=known.at.device).expand(len(mask), -1)
            row = row[known.of(at)[i, :, KIND].eq(TEXT).to(row.device)]
        if not len(row):
            raise UnsupportedInput(f"row {i} holds no text, and only text can be read again: choose another method")
        rows.append(row)
    return rows


def _hear_kinds(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if (positions := _positions(kwargs)) is not None:
        positions.coming = positions.told or Coming(kinds=_kinds(module.config, args, kwargs))


def _hear_places(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if (positions := _positions(kwargs)) is not None:
        coming = positions.coming or positions.told or Coming()
        positions.coming = replace(coming, places=_places(kwargs.get("position_ids"), positions))


def _decoder(model: Any) -> nn.Module:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    base: nn.Module = model.base_model
    return decoder if isinstance(decoder, nn.Module) else base


def _positions(kwargs: dict[str, Any]) -> RowPositions | None:
    """Those of the cache of a forward, if it is ours."""
    if torch.compiler.is_compiling() or not is_ours(cache := cache_in(kwargs)):
        return None
    positions: RowPositions = cache.shared.positions
    return positions


def _kinds(config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """(B,T) of the new tokens; None where all of them are text."""
    ids = {token: kind for name, kind in _IDS.items() if type(token := getattr(config, name, None)) is int}
    given: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
    kinds: Tensor | None = kwargs.get("mm_token_type_ids") if ids else None
    if ids and given is not None:
        kinds = torch.zeros_like(given)
        for token, kind in ids.items():
            kinds.masked_fill_(given.eq(token), kind)
    return kinds if kinds is not None and bool(kinds.any()) else None


def _places(given: Tensor | None, positions: RowPositions) -> Tensor | None:
    """(B,T,A) of the ids that a decoder is given; None where its tokens go on from the last one."""
    if given is None or (given.shape[-1] == 1 and positions.known is None):
        return None
    if given.dim() == 2:
        return given[..., None].expand(*given.shape, positions.axes)
    return given[-AXES:].movedim(0, -1) if positions.axes == AXES else None
