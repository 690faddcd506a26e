"""A model with its weights as they were saved, rounded, or quantised by a library that is installed."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from keepkv.characterize.grid.levels import CHECKPOINT, Hardware
from keepkv.errors import KeepKVError


def load(model: str, weights: str, hardware: Hardware) -> tuple[Any, Any]:
    """Model in evaluation mode and tokenizer. weights: one of ``WEIGHTS``, or "checkpoint:NAME" with GPTQ or AWQ
    weights of the same model. Raises ``KeepKVError``."""
    name = weights.removeprefix(CHECKPOINT) if weights.startswith(CHECKPOINT) else model
    dtype: Any = hardware.dtype if hardware.dtype == "auto" else getattr(torch, hardware.dtype)
    given: dict[str, Any] = {"dtype": torch.bfloat16 if weights == "bf16" else dtype}
    family, _, number = weights.partition("-")
    if family in WHILE_LOADING:
        given |= {"quantization_config": WHILE_LOADING[family](int(number[-1])), "device_map": hardware.device}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, **given)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, ImportError) as error:
        raise KeepKVError(f"cannot load {name!r} with weights {weights}: {' '.join(str(error).split())}") from error
    if family == "hqq":
        _hqq(loaded, int(number[-1]), hardware.device)
    return (loaded if family in WHILE_LOADING else loaded.to(hardware.device)).eval(), tokenizer


def _torchao(bits: int) -> Any:
    from importlib import import_module

    from transformers import TorchAoConfig

    kinds: Any = import_module("torchao.quantization")
    return TorchAoConfig(kinds.Int8WeightOnlyConfig() if bits == 8 else kinds.Int4WeightOnlyConfig())


def _quanto(bits: int) -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights=f"int{bits}")


def _hqq(model: Any, bits: int, device: str) -> None:
    """Quantise the linear maps of ``model`` in place, by the library itself: transformers 5 does not load with it."""
    from importlib import import_module

    made: Any = import_module("hqq.core.quantize").BaseQuantizeConfig(nbits=bits, group_size=64)
    quantise: Any = import_module("hqq.models.hf.base").AutoHQQHFModel.quantize_model
    quantise(model, quant_config=made, compute_dtype=model.dtype, device=device)


WHILE_LOADING = {"torchao": _torchao, "quanto": _quanto}
