"""What a cache is asked, as it can be: of a method by the codec, of a copy by what its original was made for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from keepkv.core.budget import Budget
from keepkv.core.calibration import needed
from keepkv.core.when import When
from keepkv.engine.state import CacheParts, Settings
from keepkv.errors import KeepKVError
from keepkv.methods import Method
from keepkv.store import CODECS, Codec


def as_written(method: Method, codec: Codec) -> Method:
    """``method``, whose heads keep the same tokens where ``codec`` writes those of a token together."""
    return replace(method, together=True) if codec.together else method


def changed(cache: CacheParts, budget: Any, when: When | None, method: Method | None, observing: bool) -> Settings:
    """The settings of a copy of ``cache``; see ``Cache.copy``. Raises ``KeepKVError`` where it cannot be asked that."""
    mine = cache.shared.settings
    chosen = method or mine.method
    if method is not None:
        chosen = as_written(method, CODECS.build(cache.codec, **cache.codec_options))
    changed = replace(
        mine,
        method=chosen if when is None else replace(chosen, when=when),
        budget=mine.budget if budget is None else Budget.of(budget),
    )
    score, read_with = chosen.score, mine.method.score
    blind = not observing and score != read_with and (score.observes or changed.stats.keys() - mine.stats.keys())
    if blind and cache.shared.positions.columns:
        raise KeepKVError(
            f"copy(method={chosen.name!r}): its score must see the text while it is read, and this cache was read "
            f"for {mine.method.name!r}. Read the text again with a cache of that method."
        )
    needs = needed(score, chosen.allocate, chosen.reduce).keys()
    more = [
        what
        for what, a, b in (
            ("undoes the rotary embedding", score.needs_rope, read_with.needs_rope),
            ("looks at hidden states", score.needs_hidden, read_with.needs_hidden),
            ("looks at the output projection", score.needs_output, read_with.needs_output),
            ("merges slots", chosen.reduce.merges, mine.method.reduce.merges),
            ("needs a calibration", needs - mine.calibrations.keys(), ()),
            ("keeps the prompt", chosen.prompt, mine.policy is not None and mine.policy.prompt),
            ("keeps different numbers of slots in each head", chosen.allocate.ragged, mine.method.allocate.ragged),
        )
        if a and not b
    ]
    if more:
        raise KeepKVError(
            f"copy(method={chosen.name!r}): it {' and '.join(more)}, and this cache was made for "
            f"{mine.method.name!r}, which does not. Make the cache with that method."
        )
    return changed
