"""Which methods can be served, and which scores must see every query of a request. Knows no vLLM."""

from __future__ import annotations

from keepkv.core.calibration import needed
from keepkv.errors import KeepKVError
from keepkv.methods.base import Method
from keepkv.observe.masses import STATE

MOST_STATS = 1  # statistics per slot that a page has room for
_WINDOWS = ("window", "span_window", STATE)  # under these names a score remembers its last queries, and no others


def check_method(method: Method) -> None:
    """Raise ``KeepKVError`` where ``method`` cannot run inside a serving engine, with what to do."""
    score, name = method.score, method.name
    if score.needs_second_reading:
        raise KeepKVError(
            f"method {name!r} has the model read the text again, which a server does not do. Use 'keepkv2', which "
            "reads once, or keepkv.Context with transformers"
        )
    if score.needs_questions:
        raise KeepKVError(
            f"method {name!r} rehearses questions, which a server does not do. Leave rehearsed=True out, or use "
            "keepkv.rehearse with transformers"
        )
    if kinds := needed(score, method.allocate, method.reduce):
        raise KeepKVError(
            f"method {name!r} needs a calibration ({', '.join(kinds)}), which this plugin does not load. Choose "
            "options that do without, or transformers"
        )
    if method.prompt:
        raise KeepKVError(
            f"method {name!r} keeps the whole prompt, which this plugin does not. Choose prompt=False, or transformers"
        )
    if score.needs_hidden:
        raise KeepKVError(
            f"method {name!r} looks at hidden states, which a serving engine does not hand to its cache. Use it with "
            "transformers"
        )
    if method.allocate.trims:
        raise KeepKVError(
            f"method {name!r} keeps as many slots as the text asks for, and a server plans their pages beforehand. "
            "Choose one that fills its budget, such as 'adakv'"
        )
    if score.needs_output:
        raise KeepKVError(
            f"method {name!r} looks at the output projection of attention, which this plugin does not read. Choose a "
            "score that does not, such as 'snapkv', or transformers"
        )
    if len(score.stats) > MOST_STATS:
        raise KeepKVError(
            f"method {name!r} keeps {len(score.stats)} numbers per slot ({', '.join(score.stats)}); pages have room "
            f"for {MOST_STATS}"
        )


def sees_all(method: Method) -> bool:
    """Whether the score must see every query, so that no part of the prompt may come from the prefix cache.

    One that remembers its last queries alone, and keeps no number per slot, need not.
    """
    score = method.score
    windowed = bool(score.remembers) and set(score.remembers) <= set(_WINDOWS)
    return score.observes and (bool(score.stats) or not windowed)


def last_queries(method: Method) -> int:
    """How many of the last queries before a compression the score looks at."""
    return max((n for name, n in method.score.remembers.items() if name in _WINDOWS), default=0)
