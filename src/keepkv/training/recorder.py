"""Recording: a cache that generates, or reads, notes when each token leaves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from keepkv.core.tokens import MOVED
from keepkv.engine.cache import Cache
from keepkv.errors import CacheStateError, KeepKVError
from keepkv.training.record import NEVER, Record


class Recorder:
    """What a cache tells of the slots that leave; made by ``record``. ``take`` gives what was noted until now."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.layers: dict[int, Tensor] = {}  # (B,H,columns) int32, of layers that were compressed

    def take(self) -> Record:
        """The record of everything that the cache has read: S is the number of columns fed, padding included.

        Raises ``CacheStateError`` where that is nothing.
        """
        columns, seen = self.cache.get_seq_length(), self.cache.seen
        heads = {one.info.index: one.store.like()[0].shape[1] for one in self.cache.compressible if one.is_initialized}
        if not heads:
            raise CacheStateError("nothing was recorded yet: the cache has read nothing. Generate with it first.")
        rows = [self._wide(i, len(seen), n, columns, seen.device) for i, n in heads.items()]
        return Record(torch.cat(rows, dim=1), heads)

    # --- what the engine tells -----------------------------------------------------------------------------------

    def left(self, layer: int, positions: Tensor, gone: Tensor, seen: Tensor) -> None:
        """Note that slots at ``positions`` (B,H,S) leave where ``gone`` (B,H,S): the next query of row b, which stands
        at ``seen[b]``, does not see them."""
        (rows, heads, _), columns = positions.shape, self.cache.shared.positions.columns
        wide = pad(self._wide(layer, rows, heads, columns, positions.device), (0, 1), value=NEVER)
        at = positions.long().masked_fill(~gone, columns)  # one column more takes what stays
        wide.scatter_(2, at, seen.to(wide)[:, None, None].expand(at.shape))
        self.layers[layer] = wide[..., :columns]

    def index(self, rows: Tensor) -> None:
        """Row i becomes the present row ``rows[i]``."""
        self.layers = {layer: x.index_select(0, rows.to(x.device)) for layer, x in self.layers.items()}

    def reset(self) -> None:
        """Every row starts anew."""
        self.layers = {}

    def _wide(self, layer: int, rows: int, heads: int, columns: int, device: torch.device) -> Tensor:
        """(B,H,columns) int32: what is noted of ``layer``."""
        known = self.layers.get(layer)
        if known is None:
            return torch.full((rows, heads, columns), NEVER, dtype=torch.int32, device=device)
        return pad(known, (0, max(0, columns - known.shape[-1])), value=NEVER)[..., :columns]


def record(cache: Cache) -> Recorder:
    """From now on ``cache`` notes which tokens leave, and when: ``recorder.take()`` is the ``Record`` for ``replay``.

    cache: of any method that only drops slots, any budget, schedule and layout, that was not compressed yet. What its
        copies do, and rows that were split off, is not noted; ``reset`` starts anew.

    Raises ``KeepKVError`` where a mask could not say what the cache did: a method that merges or turns keys, a lossy
    codec, a selection; ``CacheStateError`` where the cache was compressed already.

        cache = keepkv.Cache(model, "g-kv", budget=512)
        recorder = keepkv.training.record(cache)
        text = model.generate(**inputs, cache=cache)
        logits = keepkv.training.replay(model, text, mask, recorder.take())
    """
    check_replayable(cache)
    if any(layer.progress.compressed for layer in cache.compressible):
        raise CacheStateError("this cache was compressed before it was recorded: call record(cache) before it reads.")
    cache.shared.recorder = recorder = Recorder(cache)
    return recorder


def check_replayable(cache: Cache) -> None:
    """Raise ``KeepKVError`` where what ``cache`` does is more than dropping slots."""
    settings, name = cache.settings, cache.settings.method.name
    remedy = "Choose a method that only drops slots, such as 'g-kv' or 'snapkv', codec='none' and no selection."
    if not settings.method.reduce.drops:
        raise KeepKVError(
            f"method {name!r} merges slots or changes those that stay ({type(settings.method.reduce).__name__}), and a "
            f"replay can only hide tokens: no mask makes the merged key. {remedy}"
        )
    if MOVED in settings.stats:
        raise KeepKVError(f"method {name!r} turns keys to other positions, which no mask can say. {remedy}")
    if cache.codec != "none":
        raise KeepKVError(
            f"codec {cache.codec!r} loses some of what slots hold, and a replay attends to the exact keys and values. "
            f"{remedy}"
        )
    if settings.select is not None:
        raise KeepKVError(
            f"select={type(settings.select).__name__}: each decoded token chooses among the slots anew, which one "
            f"integer per token cannot say. {remedy}"
        )
