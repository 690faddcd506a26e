"""Tiny random-weight models that see, one per family, and prompts with images or a video for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as t
from torch import Tensor

IMAGE, VIDEO, START, END = 290, 291, 292, 293
BASE = dict(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None, max_position_embeddings=4096,
)  # fmt: skip
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
SIGLIP = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
)


def _qwen2(frames: int = 1) -> Any:
    vision = dict(depth=1, embed_dim=32, num_heads=2, hidden_size=64, mlp_ratio=2, patch_size=4)
    vision["temporal_patch_size"] = frames
    config = t.Qwen2VLConfig(text_config={**BASE, **SECTIONS}, vision_config=vision, vocab_size=300, **IDS)
    return t.Qwen2VLForConditionalGeneration(config)


def _qwen25() -> Any:
    vision = dict(
        depth=1, hidden_size=32, num_heads=2, out_hidden_size=64, intermediate_size=64, patch_size=4,
        temporal_patch_size=1, window_size=16, fullatt_block_indexes=[0],
    )  # fmt: skip
    config = t.Qwen2_5_VLConfig(text_config={**BASE, **SECTIONS}, vision_config=vision, vocab_size=300, **IDS)
    return t.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3() -> Any:
    vision = dict(
        depth=1, hidden_size=32, intermediate_size=64, out_hidden_size=64, num_heads=2, patch_size=4,
        spatial_merge_size=2, temporal_patch_size=1, deepstack_visual_indexes=[0], num_position_embeddings=64,
    )  # fmt: skip
    text = {**BASE, **SECTIONS, "head_dim": 16}
    return t.Qwen3VLForConditionalGeneration(t.Qwen3VLConfig(text_config=text, vision_config=vision, **IDS))


def _llava() -> Any:
    config = t.LlavaConfig(
        text_config={**BASE, "model_type": "llama"}, vision_config={**SIGLIP, "model_type": "clip_vision_model"},
        image_token_id=IMAGE, vision_feature_layer=-1,
    )  # fmt: skip
    return t.LlavaForConditionalGeneration(config)


def _internvl() -> Any:
    vision = {**SIGLIP, "image_size": [16, 16], "patch_size": [4, 4], "model_type": "internvl_vision"}
    text = {**BASE, "model_type": "qwen2"}
    config = t.InternVLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, downsample_ratio=0.5)
    return t.InternVLForConditionalGeneration(config)


def _smolvlm() -> Any:
    text = {**BASE, "model_type": "llama"}
    config = t.SmolVLMConfig(text_config=text, vision_config=SIGLIP, image_token_id=IMAGE, scale_factor=2)
    return t.SmolVLMForConditionalGeneration(config)


def _idefics3() -> Any:
    text = {**BASE, "model_type": "llama"}
    config = t.Idefics3Config(text_config=text, vision_config=SIGLIP, image_token_id=IMAGE, scale_factor=2)
    return t.Idefics3ForConditionalGeneration(config)


def _gemma3() -> Any:
    text = {**BASE, "head_dim": 16, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
    config = t.Gemma3Config(
        text_config=text, vision_config=SIGLIP, mm_tokens_per_image=4, image_token_id=IMAGE, boi_token_index=START,
        eoi_token_index=END,
    )  # fmt: skip
    return t.Gemma3ForConditionalGeneration(config)


def _onevision() -> Any:
    config = t.LlavaOnevisionConfig(
        text_config={**BASE, "model_type": "qwen2"}, vision_config={**SIGLIP, "model_type": "siglip_vision_model"},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_feature_layer=-1, image_grid_pinpoints=[[16, 16]],
    )  # fmt: skip
    return t.LlavaOnevisionForConditionalGeneration(config)


def _next_video() -> Any:
    config = t.LlavaNextVideoConfig(
        text_config={**BASE, "model_type": "llama"}, vision_config={**SIGLIP, "model_type": "clip_vision_model"},
        image_token_index=IMAGE, video_token_index=VIDEO, vision_feature_layer=-1, image_grid_pinpoints=[[16, 16]],
    )  # fmt: skip
    return t.LlavaNextVideoForConditionalGeneration(config)


SECTIONED = {"qwen2-vl": _qwen2, "qwen2.5-vl": _qwen25, "qwen3-vl": _qwen3}
MORE = {"qwen2-vl-pairs": lambda: _qwen2(2)}  # with tests of their own
# Images of 16 × 16 pixels, and how many tokens each is.
PLAIN = {
    "llava": (_llava, 16), "internvl": (_internvl, 4), "smolvlm": (_smolvlm, 4), "idefics3": (_idefics3, 4),
    "gemma3": (_gemma3, 4),
}  # fmt: skip
# An image as a whole, then in tiles, here one, whose rows end with a token: 16 + 4 · (4 + 1).
TILED = {"llava-onevision": (_onevision, 36), "llava-next-video": (_next_video, 36)}
PLAIN |= TILED
ZOO: dict[str, Callable[[], Any]] = {**SECTIONED, **{name: make for name, (make, _) in PLAIN.items()}}


@cache
def model(name: str) -> Any:
    """The tiny model of family ``name``, float32, evaluation mode; the same object every time."""
    torch.manual_seed(0)
    made = (ZOO | MORE)[name]().eval()
    for key, x in made.named_parameters():
        if x.dim() > 1 and "embed" not in key and "visual" not in key and "vision" not in key:
            x.data.mul_(4)  # sharper, so that positions and choices matter
    return made


def prompt(name: str, seed: int, parts: str = "tit") -> dict[str, Tensor]:
    """One row: "t" nine tokens of text, "i" an image, "v" a video (M-RoPE families)."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    pixels: dict[str, list[Tensor]] = {"i": [], "v": []}
    grids: dict[str, list[list[int]]] = {"i": [], "v": []}
    for part in parts:
        if part == "t":
            ids += torch.randint(5, 280, (9,), generator=generator).tolist()
        elif name in SECTIONED:
            t_, h, w = (1, 4, 6) if part == "i" else (3, 4, 4)
            pixels[part].append(torch.randn(t_ * h * w, 48, generator=generator))
            grids[part].append([t_, h, w])
            steps = [[START, *[IMAGE if part == "i" else VIDEO] * (h * w // 4), END]] * t_
            if part == "v" and name != "qwen3-vl":  # there each step stands by itself
                steps = [[START, *[VIDEO] * (t_ * h * w // 4), END]]
            ids += [x for step in steps for x in step]
        else:
            pixels[part].append(torch.randn(3, 16, 16, generator=generator))
            ids += [START, *[IMAGE] * PLAIN[name][1], END]
    tokens = torch.tensor([ids])
    made = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    if name in SECTIONED:
        made["mm_token_type_ids"] = (tokens == IMAGE).long() + 2 * (tokens == VIDEO)
        for part, key, grid in (
            ("i", "pixel_values", "image_grid_thw"),
            ("v", "pixel_values_videos", "video_grid_thw"),
        ):
            if pixels[part]:
                made[key], made[grid] = torch.cat(pixels[part]), torch.tensor(grids[part])
    elif pixels["i"]:
        images = torch.stack(pixels["i"])
        made["pixel_values"] = images[None] if name in ("smolvlm", "idefics3") else images
        if name in TILED:
            made["pixel_values"] = torch.stack((images, images), dim=1)
            made["image_sizes"] = torch.tensor([[16, 16]] * len(images))
        if name == "gemma3":
            made["token_type_ids"] = (tokens == IMAGE).long()
    return made


def batch(name: str, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows as one batch, padded on the left."""
    size = max(row["input_ids"].shape[1] for row in rows)
    made: dict[str, Tensor] = {}
    for key in {key for row in rows for key in row}:
        held = [row[key] for row in rows if key in row]
        if key.endswith(("ids", "mask")):
            held = [torch.nn.functional.pad(x, (size - x.shape[1], 0)) for x in held]
        made[key] = torch.cat(held)
    return made
