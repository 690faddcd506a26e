"""Muon for the matrices inside the layers, AdamW for embeddings and norms, on one schedule.

Muon (Jordan et al., 2024) replaces the momentum of a matrix by the nearest orthogonal matrix. On this model it needs
far fewer tokens than AdamW alone. It is written out here because the one in PyTorch computes in bfloat16, which
processors without AVX-512 emulate slowly.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor

from .network import Weights


def orthogonalize(m: Tensor, steps: int = 5) -> Tensor:
    """About the nearest orthogonal matrices to a stack (N, R, C), by a quintic Newton-Schulz iteration."""
    wide = m.shape[1] <= m.shape[2]
    x: Tensor = m if wide else m.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    if not wide:
        x = x.mT
    return x


class Optimizer:
    """Takes ``steps`` steps: warm-up over the first hundred, then a cosine down to a twentieth of the rate."""

    def __init__(self, w: Weights, rate: float, steps: int, muon: bool = True) -> None:
        self.steps, self.peak, self.all = steps, rate, list(w.values())
        # On a GPU the rate is a tensor: a recorded step reads it anew each time.
        gpu = self.all[0].is_cuda
        self.rate: float | Tensor = torch.tensor(rate, device=self.all[0].device) if gpu else rate
        self.stacks: dict[torch.Size, list[Tensor]] = defaultdict(list)
        rest = []
        for name, value in w.items():
            if muon and value.ndim == 2 and "embed" not in name:
                self.stacks[value.shape].append(value)
            else:
                rest.append(value)
        self.momentum = {
            shape: torch.zeros(len(found), *shape, device=found[0].device) for shape, found in self.stacks.items()
        }
        self.adam = torch.optim.AdamW(
            rest, lr=self.rate, betas=(0.9, 0.98), weight_decay=0.0, foreach=True, capturable=gpu
        )

    def schedule(self, i: int) -> None:
        """Sets the rate of step ``i``."""
        warm = min(1.0, (i + 1) / min(100, self.steps))
        rate = self.peak * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * i / self.steps)))
        if isinstance(self.rate, Tensor):
            self.rate.fill_(rate)
        else:
            self.rate = self.adam.param_groups[0]["lr"] = rate

    def step(self) -> None:
        """Applies the gradients, then clears them."""
        torch.nn.utils.clip_grad_norm_(self.all, 1.0)
        self.adam.step()
        with torch.no_grad():
            for shape, found in self.stacks.items():
                grad = torch.stack([value.grad for value in found if value.grad is not None])
                momentum = self.momentum[shape].lerp_(grad, 0.05)
                update = orthogonalize(grad.lerp(momentum, 0.95))  # Nesterov
                # Rows of unit length whatever the shape, at five times AdamW's rate.
                size = 5 * self.rate * max(1.0, shape[0] / shape[1]) ** 0.5
                if isinstance(size, Tensor):
                    update, size = update * size, 1.0
                for value, change in zip(found, update.unbind(), strict=True):
                    value.add_(change, alpha=-size)
        for value in self.all:
            value.grad = None
