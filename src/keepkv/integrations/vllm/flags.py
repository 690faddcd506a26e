"""The arguments of an engine that compresses: as keywords of ``vllm.LLM``, and as flags of ``vllm serve``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from keepkv.errors import KeepKVError
from keepkv.integrations.vllm import versions
from keepkv.integrations.vllm.calibrated import written
from keepkv.integrations.vllm.wish import SERVERS, read

Files: TypeAlias = str | Path | Sequence[str | Path] | None
_HERE = "keepkv.integrations.vllm"


def engine_args(
    method: str | None = None, budget: float | int | str | None = None, *, device: str | None = None,
    calibration: Files = None, graphs: bool = False, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Keywords of ``vllm.LLM`` or ``vllm.EngineArgs``: keepkv's scheduler, worker and backend, and the default of
    requests that ask for nothing.

    method, budget, options: as in ``keepkv.Cache``, with ``every`` for ``When(every=…)`` and ``fill``; without a budget
    a request is compressed only where it asks for it. device: "cpu" or "cuda"; None: where vLLM runs here. calibration:
    files of `keepkv calibrate`, for all requests whose methods need one. graphs: on a GPU, compile the model and hold
    what lies between two attentions in CUDA graphs ("PIECEWISE"), instead of running it eagerly. Raises
    ``KeepKVError`` for what cannot be served.
    """
    default = {"method": method, "budget": budget, SERVERS: written(calibration), **options}
    default = {name: x for name, x in default.items() if x is not None}
    read(default, asking=False)
    if device not in (None, "cpu", "cuda"):
        raise KeepKVError(f"device={device!r}: supported are 'cpu' and 'cuda'")
    if (device or device_here()) == "cpu":
        if graphs:
            raise KeepKVError("graphs are CUDA's: leave them out on a CPU, where vLLM compiles as it is told to")
        found: dict[str, Any] = {
            "worker_cls": f"{_HERE}.cpu.KeepKVWorker",
            "scheduler_cls": f"{_HERE}.scheduler.KeepKVScheduler",
        }
    else:
        found = {
            "worker_cls": f"{_HERE}.cuda.KeepKVGPUWorker",
            "scheduler_cls": f"{_HERE}.scheduler.KeepKVAsyncScheduler",
            "attention_backend": "CUSTOM",
            **({"compilation_config": {"cudagraph_mode": "PIECEWISE"}} if graphs else {"enforce_eager": True}),
        }
    return {**found, "additional_config": {"keepkv": default}} if default else found


def serve_command(
    model: str,
    method: str | None = None,
    budget: float | int | str | None = None,
    *,
    device: str | None = None,
    **options: Any,
) -> list[str]:
    """The whole command that serves ``model`` with ``engine_args``."""
    return [*versions.serve_command(), model, *serve_flags(method, budget, device=device, **options)]


def serve_flags(
    method: str | None = None, budget: float | int | str | None = None, *, device: str | None = None, **options: Any
) -> list[str]:
    """``engine_args`` as flags of ``vllm serve``."""
    flags = []
    for name, value in engine_args(method, budget, device=device, **options).items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            flags.append(flag)
        else:
            flags += [flag, value if isinstance(value, str) else json.dumps(value)]
    return flags


def device_here() -> str:
    """Where vLLM runs: "cpu" or "cuda"."""
    try:
        from vllm.platforms import current_platform
    except ModuleNotFoundError as missing:
        raise KeepKVError(
            "vLLM is not installed here, so where it will run is not known: give device='cpu' or 'cuda' (--device)"
        ) from missing
    return "cpu" if current_platform.is_cpu() else "cuda"
