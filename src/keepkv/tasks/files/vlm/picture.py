"""One picture of a record: a file, the bytes of a parquet file, or the base64 of a table."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keepkv.tasks.base import TaskError


def picture(given: Any, folders: Sequence[Path]) -> Any:
    """An image as (1,3,H,W) uint8.

    given: {"bytes": …}, {"base64": …}, or a path, also as {"path": …}, which is looked for in ``folders`` in order.
    Raises ``TaskError`` where it is not there or cannot be read, and ``ValueError`` for what is not base64.
    """
    import torch

    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as missing:
        raise TaskError("reading images takes Pillow, which is not installed: pip install pillow") from missing
    held = given if isinstance(given, dict) else {"path": given}
    name = "in the record"
    if held.get("bytes") is not None:
        source: Any = io.BytesIO(held["bytes"])
    elif "base64" in held:
        source = io.BytesIO(base64.b64decode(held["base64"], validate=True))
    else:
        source = _found(str(held["path"]), folders)
        name = str(source)
    try:
        with Image.open(source) as image:
            whole = image.convert("RGB")
            flat = torch.frombuffer(bytearray(whole.tobytes()), dtype=torch.uint8)
    except (OSError, UnidentifiedImageError) as error:
        reason = getattr(error, "strerror", None) or "not an image that Pillow reads"
        raise TaskError(f"cannot read the image {name!r}: {reason}") from error
    return flat.view(whole.height, whole.width, 3).movedim(-1, 0)[None]


def _found(path: str, folders: Sequence[Path]) -> Path:
    for folder in folders:
        if (folder / path).is_file():
            return folder / path
    raise TaskError(
        f"cannot read the image {path!r}: it is in none of {', '.join(repr(str(folder)) for folder in folders)}"
    )
