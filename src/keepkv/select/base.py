"""Selection: which of the older slots a decoded token attends to. Nothing is dropped: the next token chooses anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from keepkv.core.layer_info import LayerInfo
from keepkv.core.options import MOST, Checked, Count, Size, above, arguments, between, taken
from keepkv.core.registry import Registry
from keepkv.errors import KeepKVError
from keepkv.store.codec.base import Codec
from keepkv.store.older import Older

Selected = Annotated[int, between(1, MOST)] | Annotated[float, above(0), between(0, 1)]


class Asked(NamedTuple):
    """One decoded token of each row, and the slots that it may attend to.

    query (B,Hq,D): after RoPE. seen (B,) int64: tokens of each row, this one included, so it stands at seen − 1.
    calibration: tensors of the layer by name. place (B[,A]): its rotary position, None where that is seen − 1.
    """

    query: Tensor
    seen: Tensor
    slots: Older
    scaling: float
    softcap: float | None
    layer: LayerInfo
    calibration: Mapping[str, Tensor] | None
    place: Tensor | None = None

    def masses(self, logits: Tensor) -> Tensor:
        """Share of attention of each slot, (B,H,S), summed over the queries of a KV head, of logits (B,H,G,S)."""
        return logits.softmax(-1).sum(2)


@dataclass(frozen=True)
class Select(Checked):
    """Scores the older slots for one decoded token; subclasses say how.

    selected: slots of each KV head that are attended beside the sinks and the window: a number, or a share (a float) of
    those that a head holds. sinks, window: first and newest tokens that always are. dense: layers that attend to
    everything, counted among those that are compressed, from the end where below 0. measure: decoded tokens from one
    measurement of the attention kept to the next; 0: never.
    """

    selected: Selected = 0.125
    sinks: Count = 4
    window: Size = 32
    dense: tuple[int, ...] = ()
    measure: Count = 64

    needs_calibration: ClassVar[str | None] = None

    def scores(self, asked: Asked) -> Tensor:
        """(B,H,S), higher is better; what empty slots get does not matter."""
        raise TypeError(f"{type(self).__name__} must implement scores(asked) -> (B,H,S)")

    def check_codec(self, codec: Codec) -> None:
        """Raise ``KeepKVError`` where it cannot choose among slots that ``codec`` writes."""

    def glance_bytes(self, codec: Codec, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> float:
        """Bytes that are read to score one token, in all of ``heads`` KV heads."""
        return codec.glance_bytes(heads, key_dim, value_dim, dtype)

    def options(self) -> dict[str, Any]:
        """Every option by name, as plain data."""
        return {**asdict(self), "dense": list(self.dense)}


def always(select: Select, positions: Tensor, seen: Tensor) -> Tensor:
    """(B,H,S) bool: which of the older slots at ``positions`` (B,H,S) are attended whatever their score."""
    late = positions >= (seen - select.window)[:, None, None]
    return (positions >= 0) & ((positions < select.sinks) | late)


def choose(select: Select, scores: Tensor, positions: Tensor, seen: Tensor, together: bool) -> tuple[Tensor, Tensor]:
    """Columns (B,H,K) int64 that are attended, and which of them count, (B,H,K) bool.

    scores (B,H,S) and positions (B,H,S) of the older slots; seen (B,): tokens of each row. together: every head gets
    the slots that are best on the mean over heads. Each row and head gets as many as if it were alone.
    """
    valid, s = positions >= 0, positions.shape[2]
    must = always(select, positions, seen)
    free = (valid & ~must).sum(-1, keepdim=True)
    n = select.selected
    most = min(n, s) if isinstance(n, int) else int(-(-n * s // 1))
    wanted = free.clamp_max(n) if isinstance(n, int) else (free.double() * n).ceil().long()
    if together:
        scores = scores.mean(1, keepdim=True)
    ranked = scores.expand(positions.shape).masked_fill(must, torch.inf).masked_fill(~valid, -torch.inf)
    columns = ranked.topk(min(s, most + select.sinks + select.window), -1).indices
    inside = torch.arange(columns.shape[2], device=scores.device) < wanted + must.sum(-1, keepdim=True)
    return columns, inside


SELECTIONS: Registry[Select] = Registry("selection")


def register_select(name: str, *, replace: bool = False) -> Callable[[Any], Any]:
    """Register a ``Select`` dataclass under ``name``; its fields are its options. ``replace`` takes the place of
    another one.

    >>> @register_select("norms")
    ... @dataclass(frozen=True)
    ... class Norms(Select):
    ...     def scores(self, asked):
    ...         return torch.cat([-keys.norm(dim=-1) for keys in asked.slots.keys()], -1)
    """
    return SELECTIONS.register(name, replace=replace)


def make_select(select: str | Select | None, selected: int | float | None, options: Mapping[str, Any]) -> Select | None:
    """The selection of a name, made with ``options``; one that is made already takes none."""
    more = dict(options) if selected is None else {**options, "selected": selected}
    if select is None or isinstance(select, Select):
        if more:
            given = "no selection" if select is None else "a Select object"
            raise KeepKVError(
                f"options of a selection {sorted(more)} were given beside {given}: give its name too, such as "
                "select='exact'"
            )
        return select
    name = SELECTIONS.named(taken("Cache", "select", select, str))
    if isinstance(more.get("dense"), list):
        more["dense"] = tuple(more["dense"])
    bound = arguments(f"selection {name!r}", SELECTIONS.factory(name), **more)
    made: Select = SELECTIONS.factory(name)(*bound.args, **bound.kwargs)
    return made
