"""What differs between versions of transformers. Nothing else in keepkv asks which one is installed.

What can be seen in the library itself is looked at, not concluded from its number.
"""

from __future__ import annotations

import inspect
import warnings
from functools import cache
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import GenerationMixin
from transformers.masking_utils import create_causal_mask

# The oldest and the newest release that the whole suite was run on.
OLDEST = {"transformers": Version("5.18.0"), "torch": Version("2.6.0")}
NEWEST = {"transformers": Version("5.24.0"), "torch": Version("2.13.0")}

# What forwards and ``generate`` call their cache, and outputs theirs: "past_key_values" before transformers 5.24.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

# Whether frequencies that depend on the length of the input are written into the tensor that we refer to.
FREQUENCIES_IN_PLACE = Version(transformers.__version__) >= Version("5.23")


def cache_in(arguments: dict[str, Any]) -> Any:
    """The cache among the arguments of a call or the inputs of a forward, under its present or its former name."""
    found = arguments.get(CACHE)
    return arguments.get("past_key_values") if found is None else found


def cache_of(outputs: Any) -> Any:
    """The cache that a forward or ``generate`` returned in ``outputs``, or None."""
    return getattr(outputs, CACHE, None)


def holds_nothing(layer: Any) -> bool:
    """Whether a cache layer of transformers stands for slots of another layer."""
    return type(layer).__name__ == "DummyLayer"  # by name: transformers before 5.20 does not have it


def in_prefill() -> bool:
    """Whether ``generate`` is reading its prompt now. A last chunk of one token looks like a decoded one from here."""
    if torch.compiler.is_compiling():
        return False
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not _PREFILL:
        frame = frame.f_back
    return frame is not None


_PREFILL = GenerationMixin._prefill.__code__


def installed() -> dict[str, Version]:
    """Versions of transformers and torch that run now."""
    return {"transformers": Version(transformers.__version__), "torch": Version(torch.__version__.split("+")[0])}


def untested() -> str | None:
    """What of the installed versions is newer than any that was tested, and what to do; None where nothing is."""
    newer = [name for name, here in installed().items() if here.release[:2] > NEWEST[name].release[:2]]
    if not newer:
        return None
    here = " and ".join(f"{name} {installed()[name]}" for name in newer)
    known = " and ".join(f"{name} {NEWEST[name]}" for name in newer)
    pins = " ".join(f"'{name}=={NEWEST[name]}'" for name in newer)
    return (
        f"keepkv was tested up to {known}; {here} is newer. `keepkv check MODEL` shows whether it serves your model; "
        f"if something is off, pip install {pins}."
    )


@cache
def warn_if_untested() -> None:
    """Warn, once in a process, of a version newer than any that was tested."""
    if text := untested():
        warnings.warn(text, stacklevel=2)
