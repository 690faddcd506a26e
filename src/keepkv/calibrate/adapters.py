"""Restore tokens as their authors publish them: adapters of PEFT, and embeddings beside them (arXiv 2608.01247)."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from keepkv.calibrate.base import Tensors
from keepkv.calibrate.tensor_files import tensors_of
from keepkv.core.wholefile import reason
from keepkv.engine.passes.restore_slots import DOWN, EMBEDDINGS, UP, linear_maps
from keepkv.errors import CalibrationError

_NAME = re.compile(r"(?:.+\.)?layers\.(\d+)\.(.+)\.lora_([AB])\.weight")
_BEYOND = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias")  # more than two matrices


def read_restore_tokens(folder: Path, model: PreTrainedModel) -> Tensors:
    """Tensors by layer from ``folder``: ``adapter_config.json`` and ``adapter_model.safetensors``, LoRA as PEFT saves
    it, and ``restore_embeddings.safetensors``. The scale of the adapters is put into their second matrix.

    model: layers, maps and widths are compared with its own, for the files do not say which model they are for. Raises
    ``CalibrationError`` where a file is missing, is something else or does not fit.
    """
    config, weights = _config(folder / "adapter_config.json"), tensors_of(folder / "adapter_model.safetensors")
    learned = tensors_of(folder / "restore_embeddings.safetensors").get("restore_embeddings")
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    maps = linear_maps(model)
    words: Any = model.get_input_embeddings()
    width = words.weight.shape[-1]
    if learned is None or learned.dim() != 2 or learned.shape[-1] != width:
        found = "none" if learned is None else f"shape {tuple(learned.shape)}"
        raise CalibrationError(f"{folder}: restore_embeddings of {found}; this model has embeddings of {width} numbers")
    made: Tensors = {index: {} for index in sorted(maps)}
    for name, x in weights.items():
        parts = _NAME.fullmatch(name)
        linear = maps.get(int(parts[1]), {}).get(parts[2]) if parts else None
        if parts is None or linear is None:
            raise CalibrationError(f"{folder}: {name!r} is an adapter of nothing that {type(model).__name__} has")
        down = parts[3] == "A"
        wanted = (rank, linear.in_features) if down else (linear.out_features, rank)
        if tuple(x.shape) != wanted:
            raise CalibrationError(f"{folder}: {name!r} of shape {tuple(x.shape)}; this model takes {wanted}")
        made[int(parts[1])][(DOWN if down else UP) + parts[2]] = x if down else x * scale
    if any((UP + n[len(DOWN) :]) not in held for held in made.values() for n in held if n.startswith(DOWN)):
        raise CalibrationError(f"{folder}: an adapter has one of its two matrices alone")
    made[min(made)][EMBEDDINGS] = learned
    return made


def _config(file: Path) -> dict[str, Any]:
    """The settings of an adapter, plain LoRA alone."""
    try:
        held: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        said = reason(error) if isinstance(error, OSError) else "it is no JSON"
        raise CalibrationError(f"cannot read {str(file)!r}: {said}") from error
    whole = (
        isinstance(held, dict) and isinstance(held.get("r"), int) and isinstance(held.get("lora_alpha"), int | float)
    )
    if not whole or held.get("peft_type") != "LORA" or held["r"] < 1:
        raise CalibrationError(f"{str(file)!r} is not the configuration of a LoRA adapter, with r and lora_alpha")
    if beyond := [name for name in _BEYOND if held.get(name)]:
        raise CalibrationError(f"{str(file)!r}: {', '.join(beyond)} cannot be read; plain LoRA can")
    config: dict[str, Any] = held
    return config
