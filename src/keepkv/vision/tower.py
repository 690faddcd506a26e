"""What a vision tower makes of a picture: features, and what each received of its own attention."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keepkv.errors import UnsupportedModel
from keepkv.vision.seeing import Seeing

REDUCIBLE = ("qwen2_vl", "llava")


@dataclass(frozen=True)
class Observed:
    """Of one step: features (n,E) as the language model is given them, the attention (n,) that each received in the
    tower's second-last block, and its key there (n,D), mean over heads. n: tokens of a step."""

    features: Tensor
    attention: Tensor
    keys: Tensor


def check_reducible(model: Any) -> None:
    """Raise ``UnsupportedModel`` where features cannot be told from what the tower attends to."""
    kind = model.config.model_type
    if kind in REDUCIBLE:
        return
    why = {
        "qwen2_5_vl": "its tower looks through windows, in another order than the language model reads",
        "qwen3_vl": "features enter several layers of its language model",
        "internvl": "its tokens are pixels shuffled together after the tower",
        "smolvlm": "its tokens are pixels shuffled together after the tower",
        "idefics3": "its tokens are pixels shuffled together after the tower",
        "gemma3": "its tokens are pooled after the tower",
    }.get(kind, "how its tower attends is not known here")
    raise UnsupportedModel(
        f"{type(model).__name__}: vision features cannot be reduced, {why}. Supported are Qwen2-VL and LLaVA; "
        "methods on the cache serve the others."
    )


@torch.no_grad()
def observe(model: Any, seeing: Seeing, pixels: Tensor) -> list[Observed]:
    """What the tower makes of frames (N,3,H,W): one of each step."""
    check_reducible(model)
    given = seeing.family.pixels(pixels.to(model.dtype))
    attend = _qwen2_vl if model.config.model_type == "qwen2_vl" else _llava
    with attend(model) as heard:
        if model.config.model_type == "qwen2_vl":
            out = model.get_video_features(**given)
        else:
            out = model.get_image_features(**given)
    found = getattr(out, "pooler_output", out)
    features = torch.cat([x.flatten(0, -2) for x in found]).split(seeing.cells)
    steps = [_step(q, k, seeing.cells) for q, k in heard]
    if len(steps) != len(features):
        raise UnsupportedModel(f"{type(model).__name__}: {len(features)} steps of features, {len(steps)} were attended")
    return [Observed(x, *one) for x, one in zip(features, steps, strict=True)]


def _step(queries: Tensor, keys: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Attention (n,) and keys (n,D) of the tokens that queries and keys (h,P,D) of patches become. queries are scaled.

    Where the first patch is a class token, its attention counts; else the mean over all patches."""
    attn = (queries.double() @ keys.double().mT).softmax(-1).mean(0)  # (P,P)
    mine = keys.double().mean(0)
    patches = len(mine)
    if patches == cells + 1:
        return attn[0, 1:].float(), mine[1:].float()
    if patches % cells:
        raise UnsupportedModel(f"a tower of {patches} patches for {cells} tokens: which belong together is not known")
    # Patches of a token lie side by side.
    return attn.mean(0).view(cells, -1).mean(-1).float(), mine.view(cells, -1, mine.shape[-1]).mean(1).float()


@contextmanager
def _llava(model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, scaled queries and keys (h,P,D) of each image in the second-last block are noted down."""
    tower = model.base_model.vision_tower
    blocks = getattr(getattr(tower, "vision_model", tower), "encoder", tower).layers
    attention = blocks[max(0, len(blocks) - 2)].self_attn
    made: dict[str, Tensor] = {}
    heard: list[tuple[Tensor, Tensor]] = []

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, out: Tensor) -> None:
            made[name] = out.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # (N,h,P,D)

        return hook

    hooks = [getattr(attention, f"{name}_proj").register_forward_hook(keep(name)) for name in "qk"]
    try:
        yield heard
        heard += zip((made["q"] * attention.scale).unbind(0), made["k"].unbind(0), strict=True)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _qwen2_vl(model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """As ``_llava``, of each step."""
    blocks = model.base_model.visual.blocks
    attention = blocks[max(0, len(blocks) - 2)].attn
    turn = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
    heard: list[tuple[Tensor, Tensor]] = []
    made: list[tuple[Tensor, Any, Any]] = []

    def hear(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        made.append((hidden, kwargs["cu_seqlens"], kwargs["position_embeddings"]))

    hook = attention.register_forward_pre_hook(hear, with_kwargs=True)
    try:
        yield heard
    finally:
        hook.remove()
    for hidden, ends, (cos, sin) in made:
        q, k, _ = attention.qkv(hidden).reshape(len(hidden), 3, attention.num_heads, -1).unbind(1)
        q, k = turn(q, k, cos, sin)
        sizes = torch.diff(ends).tolist()
        scaled = (q * attention.scaling).transpose(0, 1)
        heard += zip(scaled.split(sizes, 1), k.transpose(0, 1).split(sizes, 1), strict=True)
