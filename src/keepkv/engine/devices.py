"""Where the parts of a model compute: its weights may be on several devices, or elsewhere until they are used."""

from __future__ import annotations

from collections.abc import Iterator

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
    embedding = getter() if callable(getter) else None
    return compute_device(embedding if isinstance(embedding, nn.Module) else model)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _execution_device(module: nn.Module) -> torch.device | None:
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return None
