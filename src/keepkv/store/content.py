"""Content of slots through a codec: written a tile at a time, read back, and moved as it was written."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from keepkv.core.pick import pick
from keepkv.core.slots import Slots
from keepkv.errors import UnsupportedInput
from keepkv.kernels.codes import Codes
from keepkv.store.base import Held
from keepkv.store.codec import Codec
from keepkv.store.codec.base import Fields

TILE_BYTES = 8 << 20  # of keys and values that are encoded or decoded at once
GROUP = 32  # columns are written in multiples of so many
LEARN = 1024  # newest columns that a codec learns from


@dataclass
class Content:
    """The content of one layer's slots, as the codec of ``held`` writes it. shared: what the slots of a head share,
    (B,H,N,·) by name."""

    held: Held
    shared: Fields = field(default_factory=dict)

    @property
    def codec(self) -> Codec:
        return self.held.codec

    @property
    def exact(self) -> bool:
        """Whether nothing is ever encoded."""
        return self.codec.exact is None

    def write(self, keys: Tensor, values: Tensor, positions: Tensor) -> Fields:
        """Fields (B,H,S,·) of a rectangle: keys (B,H,S,D) and values as attention reads them, positions (B,H,S)."""
        if self.exact:
            return {"keys": keys, "values": values}
        valid = positions >= 0
        late, late_values, late_positions = (x[:, :, -LEARN:] for x in (keys, values, positions))
        shared = self.codec.learn(
            self._before_rope(late, late_positions), late_values, late_positions >= 0, self.shared
        )
        pieces = []
        for part in _tiles(keys, values):
            before = self._before_rope(keys[:, :, part], positions[:, :, part])
            written, shared = self.codec.write(before, values[:, :, part], valid[:, :, part], shared)
            pieces.append(written)
        self.shared = shared
        return {name: torch.cat([x[name] for x in pieces], 2) for name in pieces[0]} if len(pieces) > 1 else pieces[0]

    def read(self, fields: Fields) -> tuple[Tensor, Tensor]:
        """Keys and values of a rectangle of fields, "positions" among them; zeros where slots are empty and share."""
        if self.exact:
            return fields["keys"], fields["values"]
        keys, values = self.codec.read(fields, self.shared)
        if self.shared:  # an empty slot may point to what another row shares: numbers of any kind, NaN among them
            empty = (fields["positions"] < 0)[..., None]
            keys, values = keys.masked_fill(empty, 0), values.masked_fill(empty, 0)
        return self._rotated(keys, fields, values.dtype), values

    def glance(self, fields: Fields) -> Tensor | Codes:
        """Keys of a rectangle of fields by the codec's ``glance``."""
        if self.exact:
            return fields["keys"]
        keys = self.codec.glance(fields, self.shared)
        return keys if isinstance(keys, Codes) else self._rotated(keys, fields, keys.dtype)

    def _rotated(self, keys: Tensor, fields: Fields, dtype: torch.dtype) -> Tensor:
        rope = self.held.layer.rope
        if not self.codec.unrotated:
            return keys
        return keys.to(dtype) if rope is None else rope.rotate(keys, self._places(fields["positions"])).to(dtype)

    def _before_rope(self, keys: Tensor, positions: Tensor) -> Tensor:
        rope = self.held.layer.rope
        if not self.codec.unrotated or rope is None:
            return keys
        return rope.unrotate(keys.to(torch.promote_types(keys.dtype, torch.float32)), self._places(positions))

    def _places(self, positions: Tensor) -> Tensor:
        """``positions`` (B,H,S) as a rotation takes them: (B,1,S[,A]) where every head holds the same tokens."""
        positions = (positions[:, :1] if self.codec.together else positions).clamp_min(0)
        return positions if self.held.places is None else self.held.places(positions)

    def prune(self, fields: Fields, valid: Tensor) -> Fields:
        """``fields``, a rectangle of all that the layer holds; what none of them shares is forgotten."""
        if valid.device.type == "meta":  # nothing is known of what they hold
            return fields
        fields, self.shared = self.codec.prune(fields, valid, self.shared)
        return fields

    # --- rows ----------------------------------------------------------------------------------------------------

    def index(self, rows: Tensor) -> None:
        """Row i becomes the present row ``rows[i]``."""
        self.shared = {name: x.index_select(0, rows.to(x.device)) for name, x in self.shared.items()}

    def join(self, other: Content, rows: tuple[int, int]) -> None:
        """Add the rows of ``other``; where entries are fewer or none, zeros stand behind. rows: how many each has."""
        joined = {}
        for name in self.shared.keys() | other.shared.keys():
            like = self.shared.get(name, other.shared.get(name))
            assert like is not None
            halves = [
                x.shared.get(name, like.new_zeros(n, *like.shape[1:])) for x, n in zip((self, other), rows, strict=True)
            ]
            size = max(x.shape[2] for x in halves)
            joined[name] = torch.cat([_longer(x, size) for x in halves])
        self.shared = joined

    def tensors(self) -> Fields:
        """What is shared, by name."""
        return {f"shared.{name}": x for name, x in self.shared.items()}

    def restore(self, tensors: Fields) -> None:
        """Take over what ``tensors`` returned; other names are not looked at."""
        start = "shared."
        self.shared = {name[len(start) :]: x for name, x in tensors.items() if name.startswith(start)}


def in_order(slots: Slots, keep: Tensor, positions: Tensor) -> Tensor:
    """Where those of ``slots`` that ``keep`` (B,H,S) marks are, (B,H,K) int64, among columns at ``positions`` (B,H,N)
    that hold the same slots in the same order, maybe with other gaps."""
    order, _ = slots.kept_indices(keep)
    there = (positions >= 0).to(torch.int8).sort(dim=-1, stable=True).indices
    behind = slots.valid.flip(-1).cumsum(-1).flip(-1)  # how many slots there are from each on
    return there.gather(2, (positions.shape[2] - behind).clamp_min(0).gather(2, order))


def by_position(slots: Slots, positions: Tensor) -> Tensor:
    """Where the positions of ``slots`` are among ``positions`` (B,H,N): (B,H,S) int64, −1 for one that is not there."""
    ordered, order = positions.long().sort(-1)
    wanted = slots.positions.long().contiguous()
    at = torch.searchsorted(ordered.contiguous(), wanted).clamp_(max=max(0, positions.shape[2] - 1))
    there = (ordered.gather(2, at) == wanted) & (wanted >= 0)
    return order.gather(2, at).masked_fill(~there, -1)


def unchanged(slots: Slots, held: Slots) -> Tensor:
    """Where each of ``slots`` (B,H,S) lies among those ``held`` (B,H,N), at its position and with its content: (B,H,S)
    int64, −1 for one that does not."""
    where = by_position(slots, held.positions)
    same, at = where >= 0, where.clamp_min(0)
    for one, two in ((slots.keys, held.keys), (slots.values, held.values)):
        same &= (pick(two, at) == one).all(-1)
    return where.masked_fill(~same, -1)


def moved(fields: Fields, where: Tensor) -> Fields:
    """Content ``fields`` (B,H,N,·) at the columns ``where`` (B,H,K)."""
    where = where.clamp_min(0)
    return {name: _taken(x, where) for name, x in fields.items()}


def check_together(positions: Tensor) -> None:
    """Raise ``UnsupportedInput`` unless every head holds the same tokens, at ``positions`` (B,H,S), as far as these are
    known."""
    if positions.device.type != "meta" and not bool((positions == positions[:, :1]).all()):
        raise UnsupportedInput(
            "the codec writes the heads of a token together, and this method keeps different tokens in each head. Give "
            "a codec that writes each head by itself, such as 'int4'."
        )


def _taken(x: Tensor, where: Tensor) -> Tensor:
    """``x`` (B,H or 1,S,·) at the columns ``where`` (B,H,K)."""
    return pick(x, where[:, : x.shape[1]])


def _tiles(keys: Tensor, values: Tensor) -> list[slice]:
    b, h, s, _ = keys.shape
    one = b * h * (keys.shape[-1] + values.shape[-1]) * keys.element_size()
    step = max(GROUP, TILE_BYTES // max(1, one) // GROUP * GROUP)
    return [slice(i, i + step) for i in range(0, s, step)] or [slice(0, 0)]


def _longer(x: Tensor, size: int) -> Tensor:
    """``x`` (B,H,N,·) with ``size`` entries, zeros behind."""
    return torch.nn.functional.pad(x, (0, 0, 0, size - x.shape[2]))
