"""What a request asks for: flat keys as HTTP carries them, read into keepkv's own method and budget. Knows no vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from keepkv.core.budget import Budget
from keepkv.core.calibration import needed
from keepkv.core.options import Seed, Size, taken
from keepkv.core.registry import known_as
from keepkv.core.when import When
from keepkv.engine.state import Settings
from keepkv.errors import BudgetError, KeepKVError
from keepkv.integrations.vllm.calibrated import calibrations
from keepkv.integrations.vllm.served import check_method
from keepkv.methods.base import Method, make_method, method_info, method_name
from keepkv.methods.presets import DEFAULT

PREFIX = "keepkv_"
OWN = ("method", "budget", "every", "seed", "fill")  # all other keys are options of the method
SERVERS = "calibration"  # files of which only the server's own arguments may speak
_WORDS = {"true": True, "false": False, "none": None, "null": None}


@dataclass(frozen=True)
class Wish:
    """How a request is to be compressed. fill: keep up to a block more, so that stock kernels read its slots; see
    ``Plan``."""

    settings: Settings
    fill: bool = False

    @property
    def method(self) -> Method:
        return self.settings.method

    @property
    def budget(self) -> Budget:
        return self.settings.budget


def wish_of(extra: Mapping[str, Any] | None, default: Mapping[str, Any] | None) -> Wish | None:
    """The wish of a request with these extra arguments; None: it is to be an ordinary request.

    extra: ``SamplingParams.extra_args``, of which keys ``keepkv_…`` count, ``vllm_xargs`` over HTTP. default: what the
    server was started with, keys without the prefix. Options go with their method: where a request names one, those of
    the default do not apply to it. Raises ``KeepKVError`` for what cannot be served.
    """
    own = {k.removeprefix(PREFIX): v for k, v in (extra or {}).items() if k.startswith(PREFIX)}
    fallback = dict(default or {})
    if SERVERS in own:
        raise KeepKVError(f"{PREFIX}{SERVERS}: files are read when the server starts: engine_args(calibration=FILE)")
    if options := set(own) - set(OWN):
        if "method" not in own:
            named = ", ".join(f"{PREFIX}{name}" for name in sorted(options))
            raise KeepKVError(
                f"{named}: none of {', '.join(PREFIX + name for name in OWN)}; an option of a method needs "
                f"{PREFIX}method in the same request"
            )
    if "method" in own:
        fallback = {name: x for name, x in fallback.items() if name in ("budget", "seed", SERVERS)}
    return read({**fallback, **own}, bool(own))


def read(asked: Mapping[str, Any], asking: bool = True) -> Wish | None:
    """The wish in ``asked``, keys without a prefix; None where nothing is to be compressed.

    asking: whether anything was asked for at all: then a budget must be among it.
    """
    given = calibrations(asked.get(SERVERS))
    values = {name: _value(x) for name, x in asked.items() if name != SERVERS}
    name = method_name(_text("method", values.get("method", DEFAULT)))
    options = {key: x for key, x in values.items() if key not in OWN}
    known = [key for key in method_info(name).options if key != "when"]
    options = {known_as(key, [*known, *OWN], f"option of {name}"): x for key, x in options.items()}
    method = make_method(name, options, given)
    every = values["every"] if "every" in values else method.when.every
    every = taken("a request", "every", every, Size | None)
    if method.name == "full":
        return None
    if values.get("budget") is None:
        if asking:
            raise BudgetError(f"{PREFIX}budget is missing: a share of the tokens such as 0.25, or slots per KV head")
        return None
    budget = Budget.of(values["budget"])
    if budget.bytes is not None or budget.share_of_bytes is not None:
        raise BudgetError(
            f"budget of {budget}: bytes belong to the server, which shares them among its requests. Give a share of "
            "the tokens, or slots per KV head"
        )
    seed = taken("a request", "seed", values.get("seed", 0), Seed)
    fill = taken("a request", "fill", values.get("fill", False), bool)
    check_method(method, given)
    method = replace(method, when=When("deferred", every))
    used = needed(method.score, method.allocate, method.reduce)
    settings = Settings(method, budget, seed, calibrations={kind: given[kind] for kind in used})
    return None if budget.share == 1.0 else Wish(settings, fill)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise KeepKVError(f"{name}={value!r}: a name is expected, such as 'snapkv'")
    return value.strip()


def _value(x: Any) -> Any:
    """``x``, or what it says where it is the text of a number or a word: HTTP arguments may arrive as texts."""
    if not isinstance(x, str):
        return x
    text = x.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
