"""Where the parts of a model compute: its weights may be on several devices, or elsewhere until they are used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

CPU = torch.device("cpu")


def compute_device(module: nn.Module) -> torch.device:
    """The device that ``module`` computes on; with weights that accelerate brings in when they are used, the device
    that it brings them to."""
    tensors = next((x.device for x in _tensors(module) if x.device.type != "meta"), None)
    hooked = next((device for part in module.modules() if (device := _execution_device(part)) is not None), None)
    return hooked or tensors or CPU


def input_device(model: nn.Module) -> torch.device:
    """The device that token ids are expected on."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embedding = getter() if callable(getter) else None
    except NotImplementedError:  # models of several parts that generate by a method of their own
        embedding = None
    return compute_device(embedding if isinstance(embedding, nn.Module) else model)


def in_memory(module: nn.Module, name: str) -> torch.Tensor | None:
    """The weight or buffer ``name`` of ``module``, from where accelerate keeps it if it is not there; None: nowhere."""
    held = getattr(module, name, None)
    if isinstance(held, torch.Tensor) and held.device.type == "meta":
        for hook in _hooks(module):
            if getattr(hook, "weights_map", None) is not None and name in hook.weights_map:
                kept: torch.Tensor = hook.weights_map[name]
                return kept
    return held if isinstance(held, torch.Tensor) else None


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,)))


def _execution_device(module: nn.Module) -> torch.device | None:
    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)  # a number is an accelerator
    return None
