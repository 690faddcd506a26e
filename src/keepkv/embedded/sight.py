"""A small trained LLaVA inside the package, so that what compression does to a model that sees can be seen offline."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from keepkv.errors import UnsupportedInput

IMAGE = "<image>"


def embedded_vlm() -> tuple[Any, Processor]:
    """Model in evaluation mode, float32, and its processor: what ``keepkv.VideoStream`` takes.

    A ``transformers.LlavaForConditionalGeneration`` that was trained on the moving scenes of ``keepkv.tasks.scenes``.
    """
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    folder = str(resources.files("keepkv.embedded") / "vlm")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, Processor(AutoTokenizer.from_pretrained(folder), model.config)


class Processor:
    """Text and images, as ``embedded_vlm`` takes them; needs no imaging library.

    tokenizer: of whole words, from a closed vocabulary. image_processor: mean and standard deviation of each colour.
    """

    def __init__(self, tokenizer: Any, config: Any) -> None:
        self.tokenizer = tokenizer
        self.side, self.tokens = config.vision_config.image_size, config.image_seq_length
        self.image_processor = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)

    def __call__(self, text: str, images: Tensor | Sequence[Tensor] = ()) -> dict[str, Tensor]:
        """One row: input_ids and attention_mask (1,T); and pixel_values (N,3,side,side), where there are images.

        text: with ``<image>`` where each of the images stands. images: uint8, (N,3,H,W) or each (3,H,W); of another
        size they are resized.
        """
        if text.count(IMAGE) != len(images):
            raise UnsupportedInput(f"{text.count(IMAGE)} {IMAGE} in the text and {len(images)} images: give as many")
        wide = text.replace(IMAGE, f" {IMAGE * self.tokens} ")
        ids = torch.tensor([self.tokenizer(wide, add_special_tokens=False)["input_ids"]])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if len(images):
            given["pixel_values"] = torch.stack([self._normalised(image) for image in images])
        return given

    def decode(self, ids: Tensor) -> str:
        """The words of ``ids``, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _normalised(self, image: Tensor) -> Tensor:
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
            raise UnsupportedInput(f"an image of shape {tuple(image.shape)}, {image.dtype}: give (3,H,W), uint8")
        x, size = image.float(), (self.side, self.side)
        if image.shape[-2:] != size:
            x = torch.nn.functional.interpolate(x[None], size, mode="bicubic", antialias=True, align_corners=False)[0]
        return (x.clamp(0, 255) / 255 - 0.5) / 0.5
