"""Restore slots: learned tokens read a whole context, once, and stay beside what is kept of it (arXiv 2608.01247)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from keepkv.core.calibration import Calibration
from keepkv.engine.attached import attach
from keepkv.engine.cache import Cache
from keepkv.engine.fingerprint import fingerprint
from keepkv.engine.model import attention_modules, inner_model
from keepkv.engine.passes.reread import feed
from keepkv.errors import CacheStateError, CalibrationError, KeepKVError, UnsupportedInput, UnsupportedModel

KIND = "restore"
EMBEDDINGS = "restore_embeddings"  # (n,E), of the first layer that has a calibration
DOWN, UP = "restore_down.", "restore_up."  # (R,in) and (out,R) of the linear map whose name in its layer follows
Tensors = Mapping[int, Mapping[str, Tensor]]  # by layer of the model, then by name

_columns: ContextVar[slice | None] = ContextVar("keepkv_restore_columns", default=None)


@torch.no_grad()
def restore_slots(
    model: PreTrainedModel, cache: Cache, calibration: Calibration, attention_mask: Tensor | None = None
) -> Tensor:
    """Let the learned tokens of ``calibration`` read what ``cache`` holds, and stay behind it. RestoreKV (arXiv
    2608.01247): n tokens attend to the full cache in one pass with low-rank adapters, before anything is evicted.

    cache: has read a text and was not compressed since, so its method has ``when=keepkv.When("deferred")``, and keeps a
        window of n recent tokens at least. They count as tokens of the row, and are part of its budget.
    calibration: of kind "restore" of this model, which ``keepkv calibrate restore`` trains.
    attention_mask (B,T): of what was fed; padding on the left. None: there is none.

    Returns the mask (B,T+n) of what ``cache`` now holds: what is fed next stands behind it.

        cache = keepkv.Cache(model, "keepkv2", 0.05, window=8, when=keepkv.When("deferred"))
        model(input_ids=context, cache=cache)
        mask = keepkv.restore_slots(model, cache, keepkv.Calibration.load("restore.safetensors"))
        cache.compress()

    The score does not look at their queries. Other threads may use the model meanwhile: its weights do not change.
    Raises ``CalibrationError`` where the calibration is of another kind or model, ``CacheStateError`` where the cache
    has read nothing or was compressed, ``KeepKVError`` where the method's window is smaller than n.
    """
    if calibration.kind != KIND:
        raise CalibrationError(f"restore_slots was given a calibration {calibration.kind!r}: give one of kind {KIND!r}")
    calibration.check(fingerprint(inner_model(model)))
    count, method = embeddings(calibration.tensors).shape[0], cache.settings.method
    if method.window < count:
        raise KeepKVError(
            f"method {method.name!r} keeps {method.window} recent tokens, and there are {count} restore tokens, which "
            f"must stay: give window={count} or more"
        )
    cache.renew()
    seen = cache.shared.positions.seen
    if seen is None or any(layer.progress.compressed for layer in cache.compressible):
        state = "has read nothing yet" if seen is None else "was compressed already"
        raise CacheStateError(
            f"the cache {state}. Make it with when=keepkv.When('deferred'), feed the whole text, call "
            "keepkv.restore_slots, and then cache.compress()."
        )
    length = cache.get_seq_length()
    mask = torch.ones(len(seen), length, dtype=torch.long, device=seen.device)
    mask = mask if attention_mask is None else attention_mask.to(mask)
    if mask.shape[1] != length or not seen.equal(mask.sum(-1).to(seen)):
        raise UnsupportedInput(
            f"a mask {tuple(mask.shape)} with {mask.sum(-1).tolist()} tokens is not of what the cache has read: "
            f"{length} columns, tokens {seen.tolist()}. Give the attention mask of all that was fed."
        )
    with adapted(model, calibration.tensors, slice(0, count)):
        return append(model, cache, mask, count)


def append(model: PreTrainedModel, cache: Cache, mask: Tensor, count: int) -> Tensor:
    """Feed ``count`` tokens behind what ``cache`` holds, which was read with ``mask`` (B,T); the score does not look at
    their queries. Returns the mask (B,T+count)."""
    for layer in cache.compressible:
        layer.listen()
    shared, before = cache.shared, cache.shared.compressing
    shared.compressing = False  # by the cache itself it would forget what its score remembers
    try:
        feed(model, cache, mask.new_zeros(len(mask), count), mask)
    finally:
        shared.compressing = before
    return torch.cat((mask, mask.new_ones(len(mask), count)), dim=1)


def embeddings(tensors: Tensors) -> Tensor:
    """(n,E): what stands for the embeddings of the restore tokens. Raises ``CalibrationError`` where there are none."""
    for held in tensors.values():
        if EMBEDDINGS in held:
            return held[EMBEDDINGS]
    raise CalibrationError(f"the calibration {KIND!r} has no {EMBEDDINGS}: make it with keepkv calibrate {KIND}")


@contextmanager
def adapted(model: nn.Module, tensors: Tensors, columns: slice) -> Iterator[None]:
    """Inside, ``columns`` of each forward of ``model`` called from here are restore tokens: they have learned
    embeddings, and low-rank adapters are added to the linear maps that they go through. Gradients reach ``tensors``."""
    inner = inner_model(model)
    wanted: list[tuple[nn.Module, Callable[..., Tensor]]] = [
        (inner.get_input_embeddings(), _embedded(embeddings(tensors)))
    ]
    for index, maps in linear_maps(inner).items():
        held = tensors.get(index, {})
        for name, linear in maps.items():
            if DOWN + name in held:
                wanted.append((linear, _added(held[DOWN + name], held[UP + name])))
    with ExitStack() as stack:
        token = _columns.set(columns)
        stack.callback(_columns.reset, token)
        for module, hook in wanted:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def linear_maps(model: PreTrainedModel) -> dict[int, dict[str, nn.Linear]]:
    """The linear maps of each layer of the model that has attention, by their name in it. Raises ``UnsupportedModel``
    where a layer has none."""
    attached = attach(model)  # its layers are told by the attention that they go through
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for index, module in attention_modules(model).items():
        layer = model.get_submodule(names[module].rpartition(".")[0])
        found[index] = {name: x for name, x in layer.named_modules() if isinstance(x, nn.Linear)}
        if not found[index]:
            raise UnsupportedModel(
                f"{type(model).__name__}: layer {index} has no torch.nn.Linear, and the adapters of restore tokens are "
                "added to those alone"
            )
    del attached
    return found


def _added(down: Tensor, up: Tensor) -> Callable[..., Tensor]:
    """A hook that adds ``up @ down`` of the input (B,T,in) to the columns of restore tokens."""

    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        columns = _columns.get()
        if columns is None:
            return out
        x = args[0][..., columns, :]
        return _changed(out, columns, out[..., columns, :] + x @ down.to(x).T @ up.to(x).T)

    return hook


def _embedded(learned: Tensor) -> Callable[..., Tensor]:
    """A hook that puts ``learned`` (n,E) in the place of the embeddings of restore tokens."""

    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        columns = _columns.get()
        return out if columns is None else _changed(out, columns, learned.to(out).expand(len(out), -1, -1))

    return hook


def _changed(out: Tensor, columns: slice, new: Tensor) -> Tensor:
    """``out`` (B,T,E) with ``new`` (B,n,E) in ``columns``, out of place, so that gradients pass."""
    return torch.cat((out[:, : columns.start], new, out[:, columns.stop :]), dim=1)
