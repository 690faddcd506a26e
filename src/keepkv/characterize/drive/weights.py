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
    if family in QUANTISERS:
        given |= {"quantization_config": QUANTISERS[family](int(number[-1])), "device_map": hardware.device}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, **given)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, ImportError) as error:
        raise KeepKVError(f"cannot load {name!r} with weights {weights}: {' '.join(str(error).split())}") from error
    return (loaded if family in QUANTISERS else loaded.to(hardware.device)).eval(), tokenizer


def _torchao(bits: int) -> Any:
    from importlib import import_module

    from transformers import TorchAoConfig

    kinds: Any = import_module("torchao.quantization")
    return TorchAoConfig(kinds.Int8WeightOnlyConfig() if bits == 8 else kinds.Int4WeightOnlyConfig())


def _quanto(bits: int) -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights=f"int{bits}")


def _hqq(bits: int) -> Any:
    from transformers import HqqConfig

    return HqqConfig(nbits=bits, group_size=64)


QUANTISERS = {"torchao": _torchao, "quanto": _quanto, "hqq": _hqq}
