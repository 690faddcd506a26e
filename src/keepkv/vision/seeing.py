"""Text with pictures in it, as a model takes it: ids, pixels and rotary positions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from keepkv.core.rope import AXES
from keepkv.core.tokens import VIDEO
from keepkv.engine.places import telling
from keepkv.engine.versions import CACHE
from keepkv.errors import UnsupportedInput, UnsupportedModel
from keepkv.video.family import Family, Sectioned, family_of
from keepkv.vision.mark import MARK

_RUN = re.compile(f"({MARK}+)")


@dataclass(frozen=True)
class Seen:
    """What of a prompt is seen. pixels (N,3,H,W): its frames as the tower takes them, one or more a step. places (1,T)
    or (3,1,T): rotary positions of all tokens of the prompt. vision (1,T) bool, and starts (1,T): those that begin a
    step."""

    pixels: Tensor
    places: Tensor
    vision: Tensor
    starts: Tensor


class Seeing:
    """A tokenizer that reads pictures too: ``encode`` puts the placeholders of a step where a text has ``MARK``.

    Marks side by side are one picture: an image, or the steps of a video. Everything else is the tokenizer's. size:
    (height, width) that all pictures are brought to. Raises ``UnsupportedModel`` where it is not known how pictures
    enter the model.
    """

    def __init__(self, model: Any, tokenizer: Any, size: tuple[int, int] | None = None, processor: Any = None) -> None:
        try:
            self.family: Family = family_of(model, processor or tokenizer, size)
        except UnsupportedModel as error:
            raise UnsupportedModel(
                f"{type(model).__name__}: how pictures enter its prompt is not known here. Supported are Qwen2-VL, "
                "Qwen2.5-VL, LLaVA, InternVL, SmolVLM and Idefics3."
            ) from error
        self.tokenizer = tokenizer
        chosen = self.family.look.size or size
        if chosen is None:
            raise UnsupportedInput(
                f"{type(model).__name__} takes pictures of any size: say which one all are brought to, size=(height, "
                f"width), multiples of {self.family.look.factor}"
            )
        self.size: tuple[int, int] = chosen
        self.grid = self.family.grid(model, self.size)
        config = model.config
        around = (getattr(config, f"vision_{end}_token_id", None) for end in ("start", "end"))
        self.start, self.end = ([x] if isinstance(x, int) else [] for x in around)

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    @property
    def cells(self) -> int:
        """Tokens of a step."""
        return self.grid[0] * self.grid[1]

    # --- text ----------------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``, each mark as the placeholders of a step."""
        ids: list[int] = []
        for i, piece in enumerate(_RUN.split(text)):
            if i % 2:
                ids += [*self.start, *[self.family.token] * (self.cells * len(piece)), *self.end]
            elif piece or (i == 0 and add_special_tokens):
                ids += self.tokenizer.encode(piece, add_special_tokens=add_special_tokens and i == 0)
                if not ids and self.tokenizer.bos_token_id is not None:  # nothing was there to put it before
                    ids = [self.tokenizer.bos_token_id]
        return ids

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        """The text of ``ids``, a mark for every placeholder."""
        token = self.family.token
        if not any(x == token for x in ids):
            return str(self.tokenizer.decode(ids, **options))
        return "".join(MARK if x == token else str(self.tokenizer.decode([x], **options)) for x in ids)

    # --- pictures ------------------------------------------------------------------------------------------------

    def seen(self, ids: Sequence[int], pictures: Sequence[Tensor], device: torch.device) -> Seen:
        """What stands behind the placeholders among ``ids``.

        pictures: in the order of the text, uint8 each, (N,3,H,W) or (N,H,W,3), or (N,F,…) with the F frames of a step
        each. Raises ``UnsupportedInput`` where these are not as many steps as the text has marks.
        """
        frames = [self._frames(x) for x in pictures]
        steps = sum(len(x) for x in frames) // self.family.frames
        vision = torch.tensor([list(ids)], device=device) == self.family.token
        if int(vision.sum()) != steps * self.cells:
            raise UnsupportedInput(
                f"a text with {int(vision.sum())} vision tokens, {self.cells} a step, was given pictures of {steps} "
                "steps: write one mark for each step"
            )
        look = self.family.look
        pixels = torch.stack([look(x.to(device), self.size) for part in frames for x in part])
        within = vision.cumsum(-1) - 1
        return Seen(pixels, self._places(vision[0]), vision, vision & (within % self.cells == 0))

    def _frames(self, picture: Tensor) -> Tensor:
        """(N·frames,3,H,W): as many frames a step as the family has; one frame a step is repeated."""
        x = torch.as_tensor(picture)
        if x.dim() not in (4, 5) or (x.shape[-3] != 3 and x.shape[-1] != 3):
            raise UnsupportedInput(
                f"a picture of shape {tuple(x.shape)}: give (N,3,H,W), or (N,F,3,H,W) with F frames a step; "
                "colours may come last"
            )
        x = x if x.dim() == 5 else x[:, None]
        x = x.movedim(-1, -3) if x.shape[-3] != 3 else x
        if x.shape[1] == 1:
            x = x.expand(-1, self.family.frames, -1, -1, -1)
        elif x.shape[1] != self.family.frames:
            if self.family.frames > 1:
                raise UnsupportedInput(f"{x.shape[1]} frames a step: this model sees {self.family.frames}, or give one")
            x = x[:, -1:]
        return x.flatten(0, 1)

    def _places(self, vision: Tensor) -> Tensor:
        """(1,T), or (3,1,T): a picture stands in time, height and width from where the text before it ended, and text
        goes on behind the largest of them (``get_rope_index`` of Qwen2-VL)."""
        if not isinstance(self.family, Sectioned):
            return torch.arange(len(vision), device=vision.device)[None]
        parts, edge, at = [], 0, 0
        changes = (vision[1:] != vision[:-1]).nonzero()[:, 0] + 1
        ends = [0, *changes.tolist(), len(vision)]
        for size in (end - start for start, end in pairwise(ends)):
            if bool(vision[at]):
                axes = [torch.arange(n, device=vision.device) for n in (size // self.cells, *self.grid)]
                part = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
            else:
                part = torch.arange(size, device=vision.device).expand(AXES, -1)
            parts.append(edge + part)
            edge, at = edge + 1 + int(part.max()), at + size
        return torch.cat(parts, 1)[:, None]


@torch.no_grad()
def read(model: Any, cache: Any, ids: Sequence[int], seen: Seen, seeing: Seeing) -> Tensor:
    """Feed one prompt with its pictures; returns its mask (1,T)."""
    tokens = torch.tensor([list(ids)], device=seen.pixels.device)
    mask = torch.ones_like(tokens)
    given = seeing.family.pixels(seen.pixels.to(model.dtype)) if len(seen.pixels) else {}
    with telling(cache, seen.vision * VIDEO, seen.starts):
        model(
            input_ids=tokens, attention_mask=mask, position_ids=seen.places, use_cache=True, logits_to_keep=1,
            **given, **{CACHE: cache},
        )  # fmt: skip
    return mask
