"""What the pieces see of one layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from keepkv.core.calibration import of_layer
from keepkv.core.slots import EMPTY, LayerView, Slots
from keepkv.engine.state import Compressible


def _live(layer: Compressible, until: Tensor | None) -> Slots:
    """The slots that statistics are updated through; of positions before ``until`` (B,), the others empty."""
    slots = layer.form.view(layer.store.live_view())
    if until is None:
        return slots
    return slots.with_(positions=slots.positions.masked_fill(slots.positions >= until[:, None, None], EMPTY))


class SlotsOnDemand(Slots):
    """Slots that are gathered when somebody first looks at them: remembering a query reads no key."""

    def __init__(self, gather: Callable[[], Slots]) -> None:
        self._gather = gather

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_gather":
            raise AttributeError(name)
        self.__dict__.update(self._gather().__dict__)
        return self.__dict__[name]

    @property
    def gathered(self) -> bool:
        """Whether anybody has looked."""
        return "positions" in self.__dict__


def view_of(layer: Compressible, query: Tensor | None = None, live: bool = False, later: int = 0) -> LayerView:
    """What the pieces see of ``layer``.

    query (B,Hq,T,D): of the latest forward, None when it is over. live: the view that statistics are updated through,
    see ``Store.live_view``; its slots are gathered only if they are looked at. later: the newest columns, which the
    view knows nothing of.
    """
    store, form, shared = layer.store, layer.form, layer.shared
    seen, positions = shared.positions.seen, shared.positions.positions
    assert seen is not None and positions is not None and layer.attention is not None
    if later:
        seen = seen - (positions[:, -later:] >= 0).sum(-1)
        positions = positions[:, :-later]
    if live:
        on_demand = not torch.compiler.is_compiling()  # compiled code sees tensors only
        gather = partial(_live, layer, seen if later else None)
        slots = SlotsOnDemand(gather) if on_demand else gather()
    else:
        slots = form.view(store.view())
    if query is None:
        query = slots.keys.new_zeros(slots.keys.shape[0], layer.progress.query_heads, 0, slots.keys.shape[-1])
    spans = shared.spans.groups.fair if shared.spans is not None and shared.settings.scopes else None
    return LayerView(
        slots=slots,
        queries=query,
        query_positions=positions[:, positions.shape[1] - query.shape[2] :],
        seen=seen,
        state=layer.score_state,
        rope=layer.info.rope,
        tokens=shared.positions.known,
        layer=layer.info.rank,
        layers=layer.info.ranks,
        seed=shared.settings.seed,
        spans=spans,
        calibration=of_layer(shared.settings.calibrations, layer.info.index, query.device),
        output=None if layer.info.output is None else layer.info.output(query.device),
        **layer.attention,
    )
