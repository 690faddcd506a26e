"""Files of tensors that others wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from keepkv.core.wholefile import reason
from keepkv.errors import CalibrationError


def tensors_of(file: Path) -> dict[str, Any]:
    """What is in a ``.safetensors`` file, or in a pickle of tensors alone.

    Raises ``CalibrationError`` where it cannot be read.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Numbers of numpy may lie beside the weights.
        core: Any = np._core.multiarray  # type: ignore[attr-defined]
        known = [np.ndarray, np.dtype, core._reconstruct, core.scalar]
        known += [type(np.dtype(x)) for x in ("float32", "float64", "int64")]
        with torch.serialization.safe_globals(known):
            held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes of its reader
        said = reason(error) if isinstance(error, OSError) else f"{error}".strip().split("\n")[0]
        raise CalibrationError(f"cannot read {str(file)!r}: {said}") from error
    if not isinstance(held, dict):
        raise CalibrationError(f"{str(file)!r} holds {type(held).__name__}: expected tensors by name")
    return held
