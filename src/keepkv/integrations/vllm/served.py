"""Which methods can be served, and which scores must see every query of a request. Knows no vLLM."""

from __future__ import annotations

from collections.abc import Mapping

from keepkv.core.calibration import Calibration, needed
from keepkv.errors import KeepKVError
from keepkv.methods.base import Method
from keepkv.observe.masses import STATE
from keepkv.score import EvenFrames, InfiniPotV, NewestFrames, Score, TaR, TextFirst, VaN
from keepkv.score.base import Wrapped

MOST_STATS = 1  # statistics per slot that a page has room for
_WINDOWS = ("window", "span_window", STATE)  # under these names a score remembers its last queries, and no others
_SIGHT = (EvenFrames, InfiniPotV, NewestFrames, TaR, TextFirst, VaN)  # they ask which tokens are of images


def check_method(method: Method, calibrations: Mapping[str, Calibration] | None = None) -> None:
    """Raise ``KeepKVError`` where ``method`` cannot run inside a serving engine, with what to do.

    calibrations: what the server was started with, by kind.
    """
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
    if score.needs_hidden:
        raise KeepKVError(
            f"method {name!r} looks at hidden states, which a serving engine does not hand to its cache. Use "
            "'keepkv3', whose gates read keys and values, or transformers"
        )
    if score.needs_output:
        raise KeepKVError(
            f"method {name!r} looks at the output projection of attention, which this plugin does not read. Choose a "
            "score that does not, such as 'snapkv', or transformers"
        )
    if _sees(score):
        raise KeepKVError(
            f"method {name!r} asks which tokens are of images, which this plugin does not say. Choose a score of text, "
            "such as 'snapkv', or transformers"
        )
    if method.prompt:
        raise KeepKVError(
            f"method {name!r} keeps the whole prompt, which this plugin does not. Choose prompt=False, or transformers"
        )
    if method.when.cap is not None:
        raise KeepKVError(
            f"method {name!r} keeps a hard cap, which a server does not. Give a budget in slots, and every=…"
        )
    if method.allocate.trims:
        raise KeepKVError(
            f"method {name!r} keeps as many slots as the text asks for, and a server plans their pages beforehand. "
            "Choose one that fills its budget, such as 'adakv'"
        )
    if len(score.stats) > MOST_STATS:
        raise KeepKVError(
            f"method {name!r} keeps {len(score.stats)} numbers per slot ({', '.join(score.stats)}); pages have room "
            f"for {MOST_STATS}. Use 'protected-lru' or 'h2o', or transformers"
        )
    _check_calibrations(method, calibrations or {})


def _sees(score: Score) -> bool:
    return isinstance(score, _SIGHT) or (isinstance(score, Wrapped) and _sees(score.score))


def _check_calibrations(method: Method, given: Mapping[str, Calibration]) -> None:
    """Raise where one that the method needs was not given, or lacks what a piece reads of it."""
    pieces = (method.score, method.allocate, method.reduce)
    for kind in needed(*pieces):
        if kind not in given:
            raise KeepKVError(
                f"method {method.name!r} needs a calibration {kind!r} of this model, and this server was started with "
                f"{', '.join(map(repr, given)) or 'none'}. Make one with keepkv calibrate {kind}, and start with "
                f"engine_args(calibration=FILE) or keepkv serve -m {method.name}:calibration=FILE, or use 'keepkv2'"
            )
    for piece in pieces:
        asks, check = getattr(piece, "needs_calibration", None), getattr(piece, "check_calibration", None)
        if asks and check:
            check(list(given[asks].tensors.values()))


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
