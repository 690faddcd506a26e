"""Selection while one token is decoded: which slots of a layer it attends to, and how much attention that keeps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from keepkv.attention.part import Part, plain
from keepkv.core.calibration import of_layer
from keepkv.core.layer_info import LayerInfo
from keepkv.engine.kv_form import KVForm
from keepkv.engine.state import Compressible
from keepkv.errors import KeepKVError, UnsupportedModel
from keepkv.kernels.logits import MASKED, cap_logits
from keepkv.select import Asked, Select, always, choose
from keepkv.store import Codec, Store
from keepkv.store.older import Older


def selected_parts(layer: Compressible, query: Tensor, scaling: float, softcap: float | None) -> list[Part] | None:
    """The parts that the decoded token with ``query`` (B,Hq,1,D) attends to; None: everything."""
    select, codec = layer.shared.settings.select, layer.store.held.codec
    if select is None or query.shape[2] != 1 or layer.progress.prefilling:
        return None
    if not codec.selectable or layer.info.among(select.dense):
        return None
    older, seen = layer.store.older(select.window), layer.shared.positions.seen
    if not older.zones or (isinstance(select.selected, int) and older.length <= select.selected):
        return None
    assert seen is not None
    calibration = of_layer(layer.shared.settings.calibrations, layer.info.index, query.device)
    place = layer.shared.positions.places(seen[:, None] - 1)[:, 0]
    asked = Asked(query[:, :, 0], seen.to(query.device), older, scaling, softcap, layer.info, calibration, place)
    columns, inside = choose(select, select.scores(asked), older.positions, asked.seen, codec.together)
    tally = layer.tally
    if select.measure and tally.selections % select.measure == 0:
        mass, recall = kept(select, asked, columns, inside)
        tally.mass_selected += mass
        tally.recall_selected += recall
        tally.measured += 1
        tally.bytes_read, tally.bytes_there = _bytes(layer, older, int(inside.sum()))
    tally.selections += 1
    return [older.take(columns, inside), *older.newest]


def kept(select: Select, asked: Asked, columns: Tensor, inside: Tensor) -> tuple[float, float]:
    """Of the slots at ``columns`` (B,H,K), where ``inside``: the share of the attention over all slots that they and
    the newest have, mean over rows and query heads; and which share of as many slots of the greatest attention of each
    KV head is among them, but for those that are attended always: 1 where there are no others."""
    older, query = asked.slots, asked.query
    logits = older.logits(query, asked.scaling, asked.softcap)
    b, h, g = logits.shape[:3]
    grouped, newest = (query.to(logits.dtype) * asked.scaling).view(b, h, g, -1), []
    for part in older.newest:
        keys = plain(part)[0].to(logits.dtype)
        newest.append(cap_logits(grouped @ keys.mT, asked.softcap) + part.bias()[:, :, None])
    taken = logits.gather(3, columns[:, :, None].expand(b, h, g, -1)).masked_fill(~inside[:, :, None], MASKED)
    some, all_ = (torch.cat((x, *newest), -1).logsumexp(-1) for x in (taken, logits))
    free = ~always(select, older.positions, asked.seen)
    best, good = choose(select, asked.masses(logits), older.positions, asked.seen, together=False)
    good &= free.gather(2, best)
    taken_ = torch.zeros_like(free).scatter_(2, columns, inside)
    found, count = int((taken_.gather(2, best) & good).sum()), int(good.sum())
    return float((some - all_).exp().mean()), found / count if count else 1.0


def _bytes(layer: Compressible, older: Older, taken: int) -> tuple[float, float]:
    """Bytes of content that the token reads, scores included, and that it would read of everything; of one row."""
    select, store = layer.shared.settings.select, layer.store
    keys, values = store.like()
    heads, sizes = keys.shape[1], (keys.shape[1], keys.shape[-1], values.shape[-1], keys.dtype)
    each = heads * len(older.positions)  # rows and heads
    assert select is not None
    held, content = int((older.positions >= 0).sum()) / each, store.slot_bytes().content
    newest = sum(int((part.positions >= 0).sum()) for part in older.newest) / each * store.slot_bytes().plain
    glance = held * select.glance_bytes(store.held.codec, *sizes)
    return glance + taken / each * content + newest, held * content + newest


def check_selection(
    select: Select | None, store: Store, codec: Codec, ours: Iterable[tuple[LayerInfo, KVForm]]
) -> None:
    """Raise ``KeepKVError`` where slots of ``store``, written by ``codec``, cannot be selected from, or where what the
    layers of a model cache is no keys and values."""
    if select is None:
        return
    if not store.selects:
        raise KeepKVError(
            f"select=… needs a store that hands out some of its slots, and {type(store).__name__} hands out all "
            "(compiled decode has fixed shapes). Give store='dense' or 'ragged'."
        )
    select.check_codec(codec)
    for info, form in ours:
        info.among(select.dense)
        if form.model_expands:
            raise UnsupportedModel(
                "select=… chooses by keys, and this model caches latents that it makes keys of: leave select= out."
            )
