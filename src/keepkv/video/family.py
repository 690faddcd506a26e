"""What differs between families of models: how steps of video enter a forward, and where they stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keepkv.core.rope import AXES
from keepkv.errors import UnsupportedModel
from keepkv.video.frames import Look

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Sectioned:
    """Qwen2-VL and Qwen2.5-VL: patches of pairs of frames, merged, with positions in time, height and width.

    frames: raw frames of a time step. token: placeholder of vision. axes: rotary positions of a token.
    """

    look: Look
    frames: int
    token: int
    patch: int
    merge: int
    axes: int = AXES

    def grid(self, model: Any, size: tuple[int, int]) -> tuple[int, int]:
        """Cells (rows, columns) of a step of frames of ``size``."""
        return size[0] // self.look.factor, size[1] // self.look.factor

    def pixels(self, frames: Tensor) -> dict[str, Tensor]:
        """What a forward takes for whole steps, ``frames`` (N,3,H,W) in order."""
        n, colours, height, width = frames.shape
        t, h, w = n // self.frames, height // self.patch, width // self.patch
        m, p = self.merge, self.patch
        cut = frames.view(t, self.frames, colours, h // m, m, p, w // m, m, p)
        rows = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)  # merged patches lie together
        return {"pixel_values_videos": rows, "video_grid_thw": torch.tensor([[t, h, w]], device=frames.device)}


@dataclass(frozen=True)
class Plain:
    """LLaVA, InternVL, SmolVLM: a frame is an image of one size, its tokens stand in a line. See ``Sectioned``."""

    look: Look
    token: int
    stacked: bool = False  # images of a row have a dimension of their own
    frames: int = 1
    axes: int = 1

    def grid(self, model: Any, size: tuple[int, int]) -> tuple[int, int]:
        frame = next(model.parameters()).new_ones(1, 3, *size)  # Idefics3 takes zeros for padding
        with torch.no_grad():
            out = model.get_image_features(**self.pixels(frame))
        found = getattr(out, "pooler_output", out)
        count = sum(x.reshape(-1, x.shape[-1]).shape[0] for x in found)
        side = round(count**0.5)
        return (side, side) if side * side == count else (1, count)

    def pixels(self, frames: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": frames[None] if self.stacked else frames}


Family = Sectioned | Plain


def family_of(model: Any, processor: Any = None, size: tuple[int, int] | None = None) -> Family:
    """How ``model`` takes video. Raises ``UnsupportedModel`` where a stream cannot be made of its forwards."""
    config, kind = model.config, model.config.model_type
    vision: Any = getattr(config, "vision_config", None)
    sight = getattr(processor, "video_processor", None) or getattr(processor, "image_processor", None)
    told = {name: tuple(x) for name in ("mean", "std") if (x := getattr(sight, f"image_{name}", None))}
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        factor = vision.patch_size * vision.spatial_merge_size
        look = Look(factor, size, **{"mean": CLIP_MEAN, "std": CLIP_STD, **told})
        return Sectioned(
            look, vision.temporal_patch_size, config.video_token_id, vision.patch_size, vision.spatial_merge_size
        )
    if kind in ("llava", "internvl", "smolvlm", "idefics3"):
        side = vision.image_size
        fixed = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
        return Plain(Look(1, fixed, **told), config.image_token_id, stacked=kind in ("smolvlm", "idefics3"))
    why = {
        "qwen3_vl": "it writes the time of every step as text before it",
        "gemma3": "its images see themselves in both directions, and other layers have a sliding window",
        "llava_onevision": "it puts a token behind the whole video",
        "llava_next_video": "it pools the frames of a video, and not those that come as images",
    }.get(kind, "how it takes video is not known here")
    raise UnsupportedModel(
        f"{type(model).__name__}: no video stream, {why}. Supported are Qwen2-VL, Qwen2.5-VL, LLaVA, InternVL, SmolVLM "
        "and Idefics3; keepkv.Cache serves one video at a time for the others."
    )
