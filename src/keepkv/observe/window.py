"""The last queries of each row or span, remembered between forwards for scores that look through a window."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.core.intervals import FAR
from keepkv.core.slots import EMPTY, LayerView


def remember(view: LayerView, size: int, name: str = "window") -> None:
    """Keep the last ``size`` queries of each row in ``view.state``.

    Sets ``state[name]`` (B,H*G,size,D) and ``state[name + "_positions"]`` (B,size), oldest first, ``EMPTY`` where
    fewer were seen. Padding never pushes a real query out: only left padding exists, so it is the oldest.
    In one-token steps the tensors are updated in place, as compiled decode requires.
    """
    queries, positions = view.queries[:, :, -size:], view.query_positions[:, -size:]
    held, held_positions = view.state.get(name), view.state.get(f"{name}_positions")
    if held is None or held_positions is None:
        b, heads, _, d = queries.shape
        held, held_positions = queries.new_zeros(b, heads, size, d), positions.new_full((b, size), EMPTY)
        view.state[name], view.state[f"{name}_positions"] = held, held_positions
    real = (positions >= 0).sum(-1, keepdim=True)  # (B,1)
    # Row by row: the last `size` of (held, new) where a row's padded new columns do not count.
    source = torch.arange(size, device=positions.device) + real  # index into held ++ new without padding
    skip = (source >= size) * (positions.shape[1] - real)
    index = source + skip
    all_positions = torch.cat((held_positions, positions), dim=1)
    all_queries = torch.cat((held, queries), dim=2)
    held_positions.copy_(all_positions.gather(1, index))
    wide = index[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
    held.copy_(all_queries.gather(2, wide))


def window(view: LayerView, size: int, name: str = "window") -> tuple[Tensor, Tensor]:
    """Queries (B,H*G,W,D) and positions (B,W) of the last ``size`` queries: remembered ones if ``remember`` ran,
    otherwise those of the latest forward."""
    if name in view.state:
        return view.state[name][:, :, -size:], view.state[f"{name}_positions"][:, -size:]
    return view.queries[:, :, -size:], view.query_positions[:, -size:]


def remember_in_spans(view: LayerView, size: int) -> None:
    """Keep the last queries of each span in ``view.state``, ``size`` of them together as ``_columns`` divides them.

    Sets ``state["span_window"]`` (B,H*G,V,D) and ``state["span_window_positions"]`` (B,V), ``EMPTY`` where nothing is
    known. A span that is not at its end yet has those of its last queries so far, so chunks make no difference.
    """
    state, (queries, positions) = view.state, _in_spans(view, size)
    if "span_window" in state:
        state["span_window"].copy_(queries)
        state["span_window_positions"].copy_(positions)
    else:
        state["span_window"], state["span_window_positions"] = queries, positions


def span_window(view: LayerView, size: int) -> tuple[Tensor, Tensor]:
    """Queries (B,H*G,V,D) and positions (B,V) that vote within ``view.spans``: remembered ones if ``remember_in_spans``
    ran, otherwise those of the latest forward."""
    if "span_window" in view.state:
        return view.state["span_window"], view.state["span_window_positions"]
    return _in_spans(view, size)


def _in_spans(view: LayerView, size: int) -> tuple[Tensor, Tensor]:
    """What is remembered after the latest forward."""
    queries, positions = view.queries, view.query_positions
    starts, ends, back = _columns(view, size)
    wanted = ends.minimum(view.seen[:, None]) - back  # (B,V)
    wanted = wanted.masked_fill(wanted < starts, EMPTY)
    held, held_positions = view.state.get("span_window"), view.state.get("span_window_positions")
    if held is None or held_positions is None:  # one query of nowhere, for where nothing is known
        held, held_positions = (
            queries.new_zeros(*queries.shape[:2], 1, queries.shape[3]),
            positions.new_full((1, 1), EMPTY),
        )
    same = (wanted[:, :, None] == held_positions[:, None]) & (wanted >= 0)[:, :, None]  # (B,V,V)
    known, source = same.any(-1), same.int().argmax(-1)
    if positions.shape[1]:
        # Positions of a forward are consecutive behind its padding.
        column = positions.shape[1] - (view.seen[:, None] - wanted)
        near = column.clamp(0, positions.shape[1] - 1)
        new = (wanted >= 0) & (column == near) & (positions.gather(1, near) == wanted)
        known, source = known | new, torch.where(new, held.shape[2] + near, source)
    everything = torch.cat((held, queries), dim=2)
    wide = source[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
    return everything.gather(2, wide), wanted.masked_fill(~known, EMPTY)


def _columns(view: LayerView, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Start and end of the span that each column of a window over spans belongs to, and how far before the span's end
    it votes, 1 for the last token; all (B,V), V = max(``size``, K). Spare columns lie in an empty span.

    Each span in turn gets an equal part of what is left of ``size``, at least one query, at most its length: of two
    spans min(⌊size/2⌋, n₁) and min(the rest, n₂).
    """
    spans = view.spans
    assert spans is not None
    lengths = spans.ends - spans.starts
    left, waiting = torch.full_like(view.seen, size), (lengths > 0).sum(-1)
    parts = []
    for k in range(spans.size):
        parts.append((left // waiting.clamp(min=1)).clamp(min=1).minimum(lengths[:, k]))
        left, waiting = (left - parts[-1]).clamp(min=0), waiting - 1
    stop = torch.stack(parts, -1).cumsum(-1)  # (B,K): one past the last column of each span
    columns = torch.arange(max(size, spans.size), device=stop.device).expand(len(stop), -1).contiguous()
    span = torch.searchsorted(stop, columns, right=True)
    spare = span >= spans.size
    span = span.clamp(max=spans.size - 1)
    starts = spans.starts.gather(1, span).masked_fill(spare, FAR)
    return starts, spans.ends.gather(1, span), stop.gather(1, span) - columns
