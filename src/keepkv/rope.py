"""Rotary position embedding as data: enough to undo it, redo it elsewhere, and average it over positions."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn


def _exact(x: Tensor) -> Tensor:
    """In float64 where the device has it: angles grow with the position, and only their fraction matters."""
    return x.float() if x.device.type == "mps" else x.double()


def mean_phase(step: Tensor, start: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean of cos and of sin of ``p * step`` over the ``count`` positions p = start, start+1, …

    step (…) radians per position, start (B,); both results (B,…), float64 where the device has it. Closed form of the
    averaged rotation of arXiv 2510.00636: the mean of e^{ip·step} is m·e^{iφ}, φ = (start + (count−1)/2)·step,
    m = sin(count·step/2) / (count·sin(step/2)), which may be negative.
    """
    step, start = _exact(step), _exact(start)
    half = step / 2
    below = half.sin()
    flat = below.abs() < 1e-9
    # L'Hôpital where the step is a multiple of a full turn, zero above all.
    m = torch.where(
        flat,
        (count * half).cos() / half.cos(),
        (count * half).sin() / (count * below.masked_fill(flat, 1.0)),
    )
    angle = (start + (count - 1) / 2).view(-1, *([1] * step.dim())) * step
    return m * angle.cos(), m * angle.sin()


@dataclass(frozen=True)
class Rope:
    """The rotation of one layer: the first ``2 * len(inv_freq)`` dims of a head are rotated, the rest pass through.

    inv_freq (R/2,) float32: angle per position of each pair. scaling: factor the model applies to cos and sin.
    interleaved: pairs are (0,1),(2,3),… instead of (i, i + R/2).
    """

    inv_freq: Tensor
    scaling: float = 1.0
    interleaved: bool = False

    @property
    def dims(self) -> int:
        """R: rotated dims of a head."""
        return 2 * self.inv_freq.shape[0]

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rotated = x[..., : self.dims]
        if self.interleaved:
            return rotated[..., 0::2], rotated[..., 1::2]
        first, second = rotated.chunk(2, dim=-1)
        return first, second

    def _join(self, first: Tensor, second: Tensor, x: Tensor) -> Tensor:
        pairs = (
            torch.stack((first, second), dim=-1).flatten(-2) if self.interleaved else torch.cat((first, second), dim=-1)
        ).to(x.dtype)
        return pairs if self.dims == x.shape[-1] else torch.cat((pairs, x[..., self.dims :]), dim=-1)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = self._pairs(x)
        return self._join(first * cos - second * sin, second * cos + first * sin, x)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Apply RoPE to ``x`` (…,T,D) at integer ``positions`` (…,T), broadcast over leading dims."""
        return self._turn(x, *self.phases(positions, self.scaling))

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Undo ``rotate``: ``unrotate(rotate(x, p), p) == x``."""
        cos, sin = self.phases(positions, 1 / self.scaling)
        return self._turn(x, cos, -sin)

    def phases(self, positions: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
        """cos and sin (…,T,R/2), float32, of the angles at ``positions`` (…,T), times ``scaling``."""
        angle = positions[..., None].to(torch.float32) * self.inv_freq
        cos, sin = angle.cos(), angle.sin()
        return (cos, sin) if scaling == 1.0 else (cos * scaling, sin * scaling)

    def back(self, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
        """Write ``x`` (…,T,D), at positions of these ``phases`` with 1/``scaling``, to ``out`` as it was before
        ``rotate``: no temporary, no gradient."""
        (first, second), (a, b) = self._pairs(x), self._pairs(out)
        torch.mul(second, sin, out=a).addcmul_(first, cos)
        torch.mul(second, cos, out=b).addcmul_(first, sin, value=-1)
        out[..., self.dims :] = x[..., self.dims :]

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """``x`` (…,T,D) from where it is to ``by`` (…,T) positions further, as ``unrotate`` and ``rotate`` would."""
        return self._turn(x, *self.phases(by))

    def average(self, x: Tensor, start: Tensor, count: int, transpose: bool = False) -> Tensor:
        """Apply R̄, the mean of the rotations at positions start … start+count−1, to ``x`` (B,…,D); start (B,).

        ``transpose`` applies R̄ᵀ: (R̄μ)·k = μ·(R̄ᵀk). R̄ is no rotation: it damps the fast pairs.
        """
        shape = (x.shape[0], *([1] * (x.dim() - 2)), -1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = ((t.view(shape) * self.scaling).to(dtype) for t in mean_phase(self.inv_freq, start, count))
        return self._turn(x, cos, -sin if transpose else sin)

    def average_moment(self, moment: Tensor, start: Tensor, count: int) -> Tensor:
        """Mean of R_p M R_pᵀ over positions p = start … start+count−1, for ``moment`` M (B,H,D,D) symmetric.

        Closed form: with every pair a complex number z, E[z_a z̄_b] turns by θ_a − θ_b per position and E[z_a z_b]
        by θ_a + θ_b. Dims that are not rotated are pairs of frequency zero.
        """
        d, half = moment.shape[-1], self.dims // 2
        dims = torch.arange(d, device=moment.device)
        rotated, rest = dims[: self.dims], dims[self.dims :]
        pairs = rotated.view(-1, 2) if self.interleaved else rotated.view(2, half).T
        pairs = torch.cat((pairs, rest.view(-1, 2)))
        order = pairs.T.reshape(-1)  # all first dims, then all second dims
        x, y = pairs.T
        theta = _exact(torch.cat((self.inv_freq, self.inv_freq.new_zeros(rest.shape[0] // 2))))
        scale = torch.ones_like(theta)
        scale[:half] = self.scaling

        def block(a: Tensor, b: Tensor) -> Tensor:
            return moment[..., a[:, None], b]

        def phase(step: Tensor) -> tuple[Tensor, ...]:
            return tuple(t[:, None].to(moment.dtype) for t in mean_phase(step, start, count))

        xx, yy, xy, yx = block(x, x), block(y, y), block(x, y), block(y, x)
        cos, sin = phase(theta[:, None] - theta)
        near_re, near_im = xx + yy, yx - xy  # E[z_a z̄_b]
        near_re, near_im = near_re * cos - near_im * sin, near_re * sin + near_im * cos
        cos, sin = phase(theta[:, None] + theta)
        far_re, far_im = xx - yy, xy + yx  # E[z_a z_b]
        far_re, far_im = far_re * cos - far_im * sin, far_re * sin + far_im * cos
        top = torch.cat((near_re + far_re, far_im - near_im), dim=-1)
        bottom = torch.cat((far_im + near_im, near_re - far_re), dim=-1)
        both = torch.cat((scale, scale))
        turned = torch.cat((top, bottom), dim=-2) / 2 * (both * both[:, None]).to(moment.dtype)
        back = order.argsort()
        return turned[..., back[:, None], back]


@dataclass(frozen=True)
class UnknownRope:
    """A layer whose rotary embedding cannot be undone, and why: scores with ``needs_rope`` are refused there."""

    reason: str


def _updates_in_place() -> bool:
    """Whether transformers writes frequencies that depend on the input's length into the tensor that we refer to."""
    return Version(transformers.__version__) >= Version("5.23")


def rope_of(model: nn.Module) -> dict[int, Rope | UnknownRope | None]:
    """How each attention layer of a transformers decoder rotates its keys, by layer index; None: not at all.

    Nothing is assumed about the model class. Frequencies and scaling are read from its rotary module; then every
    attention module is run on three made-up tokens, at position 0 and at others, up to where it hands its keys to
    the cache, and the layout is the one that explains what changed. Pairing, partial rotation, layers without
    rotation, and anything done to the keys afterwards show in the keys themselves. Costs six tokens per layer.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    getter = getattr(model, "get_decoder", None)
    decoder = getter() if getter is not None else model
    decoder = decoder if isinstance(decoder, nn.Module) else model
    layers = dict(_attention_layers(decoder))
    rotaries = [m for m in decoder.modules() if any(name.endswith("inv_freq") for name, _ in _own_tensors(m))]
    if not rotaries:
        return dict.fromkeys(layers)
    if _has_sections(config) and config is not getattr(model, "config", None):
        # After an image the model counts on from a smaller position than the token's index. Undoing and redoing a
        # rotation with the same offset cancels, so text keeps its meaning; across images it is an approximation.
        warnings.warn(
            f"{type(model).__name__} gives image tokens positions in three dimensions; scores that undo the rotary "
            "embedding take the token's index instead: exact for text, approximate where the prompt holds images.",
            stacklevel=2,
        )
    return {i: _probe_layer(model, layer, rotaries, config, i) for i, layer in layers.items()}


def _has_sections(config: Any) -> bool:
    """Whether the text model takes positions in three dimensions (M-RoPE)."""
    return "mrope_section" in str(getattr(config, "rope_parameters", None) or "")


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_buffers(recurse=False)
    yield from module.named_parameters(recurse=False)


def _attention_layers(decoder: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Modules that write to a cache under a layer index; the first of each index is the self-attention."""
    seen = set()
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        inner = any(isinstance(getattr(m, "layer_idx", None), int) for m in module.modules() if m is not module)
        if isinstance(index, int) and index not in seen and not inner:
            seen.add(index)
            yield index, module


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
    own = [m for m in layer.modules() if m in rotaries]
    if len(own or rotaries) != 1:
        return UnknownRope("it has several rotary modules, and which one this layer uses cannot be told")
    rotary: Any = (own or rotaries)[0]
    layer_types = getattr(config, "layer_types", None) or []
    kind = layer_types[index] if index < len(layer_types) else None
    typed = kind is not None and hasattr(rotary, f"{kind}_inv_freq")
    prefix = f"{kind}_" if typed else ""
    frequencies = getattr(rotary, f"{prefix}inv_freq", None)
    if not isinstance(frequencies, Tensor):
        return UnknownRope(f"its rotary module has no frequencies for layers of type {kind!r}")
    rope_type = getattr(rotary, "rope_type", "default")
    rope_type = rope_type.get(kind, "") if isinstance(rope_type, dict) else rope_type
    if "dynamic" in rope_type:
        return UnknownRope("its rotary frequencies change with the length of the input (rope_type 'dynamic')")
    if (
        "longrope" in (rope_type.get(kind, "") if isinstance(rope_type, dict) else rope_type)
        and not _updates_in_place()
    ):
        return UnknownRope("transformers before 5.23 swaps its frequencies for long input where slots cannot follow")
    sections = _has_sections(config)
    scaling = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    before = frequencies.clone()
    positions = torch.tensor([1, 3, 7], device=frequencies.device)
    try:
        base = _stored(model, layer, rotary, torch.zeros_like(positions), kind if typed else None, sections)
        moved = _stored(model, layer, rotary, positions, kind if typed else None, sections)
    except Exception as error:  # whatever a model's own code raises: the layer is then simply not understood
        return UnknownRope(f"its layout could not be probed ({type(error).__name__}: {error})")
    finally:
        frequencies.data.copy_(before)  # some rotary modules rewrite them for the length that they last saw
    # Latent attention stores (latent, rotated part); elsewhere only the keys may depend on the position.
    for at_zero, at_p in zip(base, moved, strict=True):
        tolerance = (1e-3 if next(layer.parameters()).dtype == torch.float32 else 0.05) * float(at_zero.abs().max())
        if bool(((at_p - at_zero).abs() <= tolerance / 100).all()):
            continue
        for turn, interleaved in product((1, -1), (False, True)):  # −1: the other way round
            # Not copied where it need not be: some rotary modules switch frequencies in place.
            angle = frequencies.detach().to(at_zero.device, torch.float32)
            rope = Rope(angle if turn == 1 else -angle, scaling, interleaved)
            if rope.dims <= at_zero.shape[-1] and bool(
                ((rope.rotate(at_zero / scaling, positions.to(at_zero.device)) - at_p).abs() <= tolerance).all()
            ):
                return rope
        return UnknownRope("its keys do not turn with position in pairs (i, i + R/2) or (2i, 2i + 1)")
    return None


@torch.no_grad()
def _stored(
    model: Any, layer: nn.Module, rotary: nn.Module, positions: Tensor, kind: str | None, sections: bool
) -> tuple[Tensor, ...]:
    """What ``layer`` stores for three fixed tokens at ``positions`` (3,)."""
    weight = next(p for p in layer.parameters() if p.dim() == 2)
    dtype = weight.dtype if weight.dtype.is_floating_point else model.dtype
    size = model.config.get_text_config(decoder=True).hidden_size
    tokens = torch.arange(3 * size, device=weight.device).float().mul(1.7).sin().view(1, 3, size).to(dtype)
    ids = positions[None].to(weight.device)
    turned = rotary(tokens, ids.expand(3, 1, -1) if sections else ids, *([] if kind is None else [kind]))
    recorder = _Recorder()
    given = {
        "position_embeddings": turned,
        "position_ids": ids,
        "attention_mask": None,
        "past_key_values": recorder,
        "layer_past": recorder,
        "shared_kv_states": {},
        "use_cache": True,
    }
    known = inspect.signature(layer.forward).parameters
    try:
        layer(tokens, **{name: value for name, value in given.items() if name in known})
    except _KeysSeen:
        return recorder.stored
    raise RuntimeError(f"{type(layer).__name__} stores no keys")
