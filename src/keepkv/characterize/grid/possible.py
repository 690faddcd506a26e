"""Whether a point can be run here, found before anything is loaded."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

from keepkv import tasks
from keepkv.characterize.grid.levels import CHECKPOINT, FULL, Point
from keepkv.characterize.grid.read import IN_PROCESS, OWN, SERVE, Grid
from keepkv.errors import KeepKVError
from keepkv.measure.energy.cap import cannot_cap

NEEDS = {"torchao": "torchao", "quanto": "optimum.quanto", "hqq": "hqq"}  # packages by the prefix of weights
FEW = 0.9  # of the positions of a model that a prompt may take


def refusal(grid: Grid, point: Point) -> str | None:
    """Why ``point`` cannot be run with ``grid`` on this machine; None where nothing speaks against it."""
    local = grid.driver in (IN_PROCESS, SERVE)
    if not local and (point.technique.method != FULL or point.weights != "none"):
        return "somebody else's server holds its cache and weights as it was told to: only what it does is measured"
    checks = [_technique(point), _application(point)]
    if local:
        checks += [
            _weights(grid.model, point.weights, point.hardware.device),
            _device(point),
            _length(grid.model, point),
        ]
    if grid.driver == SERVE and point.weights.partition("-")[0] in NEEDS:
        checks.append(f"weights {point.weights}: our server loads weights as they are saved; quantise in process")
    return next((why for why in checks if why is not None), None)


def _technique(point: Point) -> str | None:
    from keepkv.core.budget import Budget
    from keepkv.engine.state import Settings
    from keepkv.methods.base import make_method, own_options

    one = point.technique
    if one.method == FULL:
        return None
    try:
        Settings(make_method(one.method, own_options(one.made_options())), Budget.of(one.budget or 1.0))
    except KeepKVError as error:
        return str(error)
    return None


def _application(point: Point) -> str | None:
    one = point.application
    try:
        for name in one.tasks:
            task = tasks.get(name)
            if task.turns or not task.asks:
                return f"task {name} asks no single question: it is measured with keepkv eval"
            if task.decodes and point.workload.turns > 1:
                return f"task {name} is one long reply, not {point.workload.turns} turns"
    except KeepKVError as error:
        return str(error)
    if one.text is not None and not Path(one.text).is_file():
        return f"no file {one.text!r}"
    trace = point.workload.trace
    return None if trace is None or Path(trace).is_file() else f"no trace {trace!r}"


def _weights(model: str, weights: str, device: str) -> str | None:
    family = weights.partition("-")[0]
    package = NEEDS.get(family)
    if package is not None and not _installed(package):
        return f"weights {weights}: {package} is not installed"
    if weights in ("torchao-int4",) and not device.startswith("cuda"):
        return f"weights {weights}: its kernels are for GPUs"
    if weights.startswith(CHECKPOINT):
        name = weights.removeprefix(CHECKPOINT)
        if name.startswith((".", "/", "~")) and not (Path(name).expanduser() / "config.json").is_file():
            return f"weights {weights}: no model there"
    return None


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _device(point: Point) -> str | None:
    one = point.hardware
    try:
        torch.empty(1, device=one.device)
    except (RuntimeError, AssertionError) as error:
        return f"no device {one.device!r} here: {str(error).partition(chr(10))[0]}"
    if one.dtype == "float16" and one.device == "cpu":
        return "float16 on a CPU is emulated: its times say nothing"
    return None if one.power_cap is None else cannot_cap(one.device, one.power_cap)


def _length(model: str, point: Point) -> str | None:
    longest = _positions(model)
    if longest is None or point.workload.trace is not None:
        return None
    asked = point.workload.n_in.longest * point.workload.turns
    if asked > FEW * longest:
        return f"prompts of up to {asked:,.0f} tokens: the model reads {longest:,} at most"
    return None


@lru_cache
def _positions(model: str) -> int | None:
    """Tokens that a model reads at most; None where its configuration does not say, or cannot be read yet."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path_of(model))
    except (OSError, ValueError):
        return None
    longest: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest


def path_of(model: str) -> str:
    """What transformers loads for the model of a grid."""
    from keepkv.embedded import embedded_model

    return embedded_model() if model == OWN else model
