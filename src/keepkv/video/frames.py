"""Frames: from arrays, iterators and files, to what a vision tower takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keepkv.errors import UnsupportedInput

Frames = Tensor | str | Path | Iterable[Any]
CAMERAS = "/dev/video"  # what Linux names them by, and a number behind it


def frames_of(source: Frames) -> Iterator[Tensor]:
    """Each frame (3,H,W) of a source, as it is read: a file or a camera, an array (N,H,W,3), (N,3,H,W) or one frame, or
    frames. A camera, such as "/dev/video0", does not end: take as many as you want."""
    if isinstance(source, (str, Path)):
        yield from _decoded(Path(source))
        return
    if hasattr(source, "shape"):
        array = torch.as_tensor(source)
        if array.dim() not in (3, 4):
            raise UnsupportedInput(f"frames of shape {tuple(array.shape)}: give (N,H,W,3), (N,3,H,W) or one frame")
        yield from map(_channels_first, array if array.dim() == 4 else array[None])
        return
    for one in source:
        yield from frames_of(torch.as_tensor(one))


def _channels_first(frame: Tensor) -> Tensor:
    if frame.shape[0] == 3:
        return frame
    if frame.shape[-1] != 3:
        raise UnsupportedInput(f"a frame of shape {tuple(frame.shape)} has no three colours: give (H,W,3) or (3,H,W)")
    return frame.movedim(-1, 0)


def _decoded(path: Path) -> Iterator[Tensor]:
    try:
        import av
    except ImportError as error:
        raise UnsupportedInput(
            f"{str(path)!r}: reading videos needs PyAV: pip install 'keepkv[video]'. Or decode the file yourself "
            "and push its frames."
        ) from error
    try:
        with av.open(str(path), format="v4l2" if str(path).startswith(CAMERAS) else None) as container:
            for frame in container.decode(video=0):
                yield torch.from_numpy(frame.to_ndarray(format="rgb24")).movedim(-1, 0)
    except (OSError, IndexError, ValueError) as error:
        raise UnsupportedInput(f"{str(path)!r} cannot be read as a video: {error}") from error


@dataclass(frozen=True)
class Look:
    """How pixels become what a tower takes. factor: sides are multiples of it. size: (height, width) of all frames;
    None: that of the first. mean, std: of each colour, for frames of uint8; others are taken to be normalised."""

    factor: int
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def sized(self, frame: Tensor) -> tuple[int, int]:
        """(height, width) that frames like ``frame`` (3,H,W) are brought to."""
        if self.size is not None:
            return self.size
        height, width = (max(self.factor, round(x / self.factor) * self.factor) for x in frame.shape[-2:])
        return height, width

    def __call__(self, frame: Tensor, size: tuple[int, int]) -> Tensor:
        """``frame`` (3,H,W), any size, as float32 (3,*size)."""
        x = frame.float()
        if x.shape[-2:] != size:
            x = torch.nn.functional.interpolate(x[None], size, mode="bicubic", antialias=True, align_corners=False)[0]
        if frame.dtype != torch.uint8:
            return x
        mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (self.mean, self.std))
        return (x.clamp(0, 255) / 255 - mean) / std
