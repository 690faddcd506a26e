"""How a model of transformers rotates its keys, found by running its attention modules on made-up tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from keepkv.core.rope import AXES, Rope, axes_of
from keepkv.engine.attention_probe import (
    attention_layers,
    computed_in,
    kind_of_layer,
    own_rotaries,
    rotary_modules,
    run_attention,
    text_part,
)
from keepkv.engine.devices import in_memory
from keepkv.engine.versions import FREQUENCIES_IN_PLACE


@dataclass(frozen=True)
class UnknownRope:
    """A layer whose rotary embedding cannot be undone, and why: scores with ``needs_rope`` are refused there."""

    reason: str


def rope_of(model: nn.Module) -> dict[int, Rope | UnknownRope | None]:
    """How each attention layer of a transformers decoder rotates its keys, by layer index; None: not at all.

    Nothing is assumed about the model class. Frequencies and scaling are read from its rotary module; then every
    attention module is run on three made-up tokens, at position 0 and at others, up to where it hands its keys to
    the cache, and the layout is the one that explains what changed. Pairing, partial rotation, layers without
    rotation, and anything done to the keys afterwards show in the keys themselves. Costs six tokens per layer.
    """
    config, decoder = text_part(model)
    layers = dict(attention_layers(decoder))
    rotaries = rotary_modules(decoder)
    if not rotaries:
        return dict.fromkeys(layers)
    return {i: _probe_layer(model, layer, rotaries, config, i) for i, layer in layers.items()}


class _KeysSeen(Exception):
    """Ends an attention module's forward once its keys are known."""


class _Recorder:
    """Stands in for a cache: keeps what the attention module stores first, and stops it there."""

    def __init__(self) -> None:
        self.stored: tuple[Tensor, ...] = ()

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> None:
        self.stored = (keys.detach().double(), values.detach().double())
        raise _KeysSeen

    def get_seq_length(self, *_: Any) -> int:
        return 0


def _probe_layer(
    model: nn.Module, layer: nn.Module, rotaries: list[nn.Module], config: Any, index: int
) -> Rope | UnknownRope | None:
    own = own_rotaries(layer, rotaries)
    if len(own) != 1:
        return UnknownRope("it has several rotary modules, and which one this layer uses cannot be told")
    rotary: Any = own[0]
    kind, typed = kind_of_layer(config, index, rotary)
    prefix = f"{kind}_" if typed else ""
    frequencies = in_memory(rotary, f"{prefix}inv_freq")
    if not isinstance(frequencies, Tensor):
        return UnknownRope(f"its rotary module has no frequencies for layers of type {kind!r}")
    rope_type = getattr(rotary, "rope_type", "default")
    rope_type = rope_type.get(kind, "") if isinstance(rope_type, dict) else rope_type
    if "dynamic" in rope_type:
        return UnknownRope("its rotary frequencies change with the length of the input (rope_type 'dynamic')")
    if (
        "longrope" in (rope_type.get(kind, "") if isinstance(rope_type, dict) else rope_type)
        and not FREQUENCIES_IN_PLACE
    ):
        return UnknownRope("transformers before 5.23 swaps its frequencies for long input where slots cannot follow")
    axes = axes_of(config)
    scaling = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    positions = torch.tensor([1, 3, 7], device=frequencies.device)
    if axes > 1:
        positions = torch.stack((positions, positions.flip(0), positions + 4), dim=-1)

    def stored(at: Tensor) -> tuple[Tensor, ...]:
        return _stored(model, layer, rotary, at, kind if typed else None)

    try:
        base, moved = stored(torch.zeros_like(positions)), stored(positions)
        alone = [stored(_apart(axis, frequencies.device)) for axis in range(axes)] if axes > 1 else []
    except Exception as error:  # whatever a model's own code raises: the layer is then simply not understood
        return UnknownRope(f"its layout could not be probed ({type(error).__name__}: {error})")
    # Latent attention stores (latent, rotated part); elsewhere only the keys may depend on the position.
    for i, (at_zero, at_p) in enumerate(zip(base, moved, strict=True)):
        tolerance = (1e-3 if computed_in(model, layer) == torch.float32 else 0.05) * float(at_zero.abs().max())
        if bool(((at_p - at_zero).abs() <= tolerance / 100).all()):
            continue
        for turn, interleaved in product((1, -1), (False, True)):  # −1: the other way round
            # Not copied where it need not be: some rotary modules switch frequencies in place.
            angle = frequencies.detach().to(at_zero.device, torch.float32)
            rope = Rope(angle if turn == 1 else -angle, scaling, interleaved)
            if alone and rope.dims <= at_zero.shape[-1]:
                rope = replace(rope, axis=_axis(rope, at_zero, [x[i] for x in alone]))
            if rope.dims <= at_zero.shape[-1] and bool(
                ((rope.rotate(at_zero / scaling, positions.to(at_zero.device)) - at_p).abs() <= tolerance).all()
            ):
                return rope
        return UnknownRope("its keys do not turn with position in pairs (i, i + R/2) or (2i, 2i + 1)")
    return None


def _apart(axis: int, device: torch.device) -> Tensor:
    """Positions (3,3) of three tokens, 0 on all axes but one: some turn the fast pairs far, some the slow ones."""
    positions = torch.zeros(3, AXES, dtype=torch.int64, device=device)
    positions[:, axis] = torch.tensor([1, 997, 999_983])
    return positions


def _axis(rope: Rope, at_zero: Tensor, alone: list[Tensor]) -> Tensor:
    """(R/2,) int64: the axis that turns each pair, the one along which it moves most. at_zero, alone: keys (B,H,3,D) at
    position 0, and at positions on one axis alone."""
    moves = []
    for x in alone:
        first, second = rope.pairs(x - at_zero)
        moves.append((first.square() + second.square()).sum(dim=(0, 1, 2)))
    return torch.stack(moves).argmax(0)


def _stored(model: Any, layer: nn.Module, rotary: nn.Module, positions: Tensor, kind: str | None) -> tuple[Tensor, ...]:
    """What ``layer`` stores for three fixed tokens at ``positions`` (3[,A])."""
    recorder = _Recorder()
    try:
        run_attention(model, layer, recorder, positions, rotary, kind)
    except _KeysSeen:
        return recorder.stored
    raise RuntimeError(f"{type(layer).__name__} stores no keys")
