"""Weights that authors published for a model, read from their files into a calibration."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.calibrate.adapters import read_restore_tokens
from keepkv.calibrate.base import Tensors
from keepkv.calibrate.tensor_files import tensors_of
from keepkv.core.calibration import Calibration
from keepkv.core.registry import known_as
from keepkv.engine.cache import Cache
from keepkv.engine.fingerprint import fingerprint
from keepkv.engine.passes import restore_slots
from keepkv.engine.passes.reread import feed
from keepkv.errors import CalibrationError
from keepkv.measure.environment import versions
from keepkv.score.learned import fast_kvzip, kvzap

FILES = ("model.safetensors", "pytorch_model.bin")
_LAYER = re.compile(r"(?:layers|module_list|modules_list)\.(\d+)\.(?:([02])\.)?(weight|bias)")
_KVZAP = {  # by the number of a layer of the network, None where there is one alone
    (None, "weight"): kvzap.WEIGHT, (None, "bias"): kvzap.BIAS,
    ("0", "weight"): kvzap.INNER, ("0", "bias"): kvzap.INNER_BIAS,
    ("2", "weight"): kvzap.WEIGHT, ("2", "bias"): kvzap.BIAS,
}  # fmt: skip
_GATE = {  # dims of each tensor of a gate of Fast KVzip: heads H, queries of each G, rank R, sinks M, hidden states E
    "q_proj.weight": ("H*G*R", "E"), "q_proj.bias": ("H*G*R",), "k_proj.weight": ("H*R", "E"), "q_norm.weight": ("R",),
    "k_norm.weight": ("R",), "k_base": ("H", "1", "M", "R"), "b": ("H", "1", "G"),
}  # fmt: skip


def published(kind: str, model: PreTrainedModel, path: str | Path, command: str = "") -> Calibration:
    """The calibration of ``kind`` that the authors' weights at ``path`` make for ``model``; nothing is measured.

    "kvzap": a directory with ``model.safetensors`` (or ``pytorch_model.bin``), or that file, as ``KVzapModel`` of
    kvpress saves it. "fast-kvzip": a ``.pt`` file with one gate per layer under "module". "restore": a directory with
    adapters of PEFT and ``restore_embeddings.safetensors``. Only tensors are read from pickles. command: the line that
    was typed, for the record. Raises ``CalibrationError`` where the file cannot be read or has other layers, heads or
    widths than ``model``: the files do not say which model they are for.
    """
    kind = known_as(kind, [*_READERS, restore_slots.KIND], "kind of published weights")
    where = Path(path).expanduser()
    facts = {"command": command, "tokens": 0, "published": str(where), "versions": versions()}
    cache = Cache(model, "full")
    if kind == restore_slots.KIND:
        return Calibration(kind, read_restore_tokens(where, model), fingerprint(model), facts)
    found, heads, width = _READERS[kind](where)
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    with torch.no_grad():
        feed(model, cache, ids, ids.new_ones(1, 0))
    ours = {layer.info.index: layer.store.like()[0].shape[1] for layer in cache.compressible}
    config: Any = model.config.get_text_config(decoder=True)
    if len(found) == len(ours):
        found = dict(zip(ours, found.values(), strict=True))
    if not ours.keys() <= found.keys() or set(ours.values()) != {heads} or width != config.hidden_size:
        has = f"{len(cache.layers)}, {' or '.join(map(str, sorted(set(ours.values()))))} and {config.hidden_size}"
        raise CalibrationError(
            f"{where}: {kind} weights of {len(found)} layers, {heads} KV heads and hidden states of {width} numbers; "
            f"{type(model).__name__} has {has}. Give those that were published for this model."
        )
    return Calibration(kind, {i: found[i] for i in ours}, fingerprint(model), facts)


def _kvzap(path: Path) -> tuple[Tensors, int, int]:
    """Tensors by layer, KV heads and width."""
    file = next((path / name for name in FILES if (path / name).is_file()), path / FILES[0]) if path.is_dir() else path
    made: Tensors = {}
    for name, x in tensors_of(file).items():
        if not isinstance(x, Tensor) or (parts := _LAYER.fullmatch(name)) is None:
            raise _foreign(file, "a KVzap model", f"tensor {name!r}")
        made.setdefault(int(parts[1]), {})[_KVZAP[parts[2], parts[3]]] = x
    shapes = {tuple((name, tuple(x.shape)) for name, x in sorted(held.items())) for held in made.values()}
    if len(shapes) != 1:
        raise _foreign(file, "a KVzap model", f"layers of {len(shapes)} shapes")
    one = next(iter(made.values()))
    if set(one) not in ({kvzap.WEIGHT, kvzap.BIAS}, set(_KVZAP.values())):
        raise _foreign(file, "a KVzap model", f"layers of {', '.join(sorted(one))}")
    first, last = one.get(kvzap.INNER, one[kvzap.WEIGHT]), one[kvzap.WEIGHT]
    rows = [(kvzap.WEIGHT, kvzap.BIAS), (kvzap.INNER, kvzap.INNER_BIAS)]
    matches = all(one[w].shape[:1] == one[b].shape for w, b in rows if w in one)
    if not matches or (kvzap.INNER in one and last.shape[1] != first.shape[0]):
        raise _foreign(file, "a KVzap model", "weights and biases that do not fit together")
    return dict(sorted(made.items())), last.shape[0], first.shape[1]


def _fast_kvzip(path: Path) -> tuple[Tensors, int, int]:
    gates = tensors_of(path).get("module")
    if not isinstance(gates, list) or not gates or not all(isinstance(x, dict) for x in gates):
        raise _foreign(path, "gates of Fast KVzip", "no list of gates under 'module'")
    made: Tensors = {}
    for index, gate in enumerate(gates):
        if gate.keys() != _GATE.keys() or not all(isinstance(x, Tensor) for x in gate.values()):
            raise _foreign(path, "gates of Fast KVzip", f"a gate of {', '.join(map(str, gate))}")
        dims = {"1": 1, "R": len(gate["q_norm.weight"]), "E": gate["q_proj.weight"].shape[-1]}
        dims |= dict(zip(("H", "M", "G"), (gate["k_base"].shape[0], gate["k_base"].shape[-2], gate["b"].shape[-1]),
                         strict=True))  # fmt: skip
        for name, shape in _GATE.items():
            wanted = tuple(int(np.prod([dims[x] for x in dim.split("*")])) for dim in shape)
            if tuple(gate[name].shape) != wanted:
                raise _foreign(path, "gates of Fast KVzip", f"{name!r} of shape {tuple(gate[name].shape)}")
        made[index] = {fast_kvzip.PREFIX + name: x for name, x in gate.items()}
    return made, dims["H"], dims["E"]


_READERS: dict[str, Callable[[Path], tuple[Tensors, int, int]]] = {
    kvzap.KIND: _kvzap, fast_kvzip.KIND: _fast_kvzip,
}  # fmt: skip


def _foreign(file: Path, what: str, found: str) -> CalibrationError:
    return CalibrationError(f"{str(file)!r} is not {what} as its authors publish it: it has {found}")
