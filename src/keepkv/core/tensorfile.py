"""Named tensors and a header in one file: safetensors with a checksum, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from keepkv.errors import KeepKVError


def write(path: Path, format: str, header: str, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` and ``header`` (JSON) to ``path``, which holds either what it held or all of the new file.

    format: what the file is, e.g. "keepkv-calibration-1"; ``read`` asks for the same. Raises ``OSError``.
    """
    held = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(held, unfinished, {"format": format, "header": header, "digest": digest(header, held)})
        os.replace(unfinished, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path, format: str, what: str, wrong: type[KeepKVError]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that ``write`` made, on the CPU.

    Raises ``wrong`` where the file is missing, truncated, altered, or not ``what`` (its ``format`` is another).
    """
    if not path.is_file():
        raise wrong(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != format:
                raise wrong(f"{path}: not {what} written by keepkv ({meta.get('format')!r}, need {format!r})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise wrong(f"{path}: not a readable safetensors file, or truncated: {error}") from error
    text = meta.get("header", "")
    if digest(text, tensors) != meta.get("digest"):
        raise wrong(f"{path}: contents do not match their checksum; the file was altered or damaged")
    header: dict[str, Any] = json.loads(text)
    return header, tensors


def digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 in hexadecimal of a header and of the name, dtype, shape and bytes of each tensor."""
    sha = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}{x.dtype}{tuple(x.shape)}".encode())
        sha.update(x.flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return sha.hexdigest()
