"""The matrix that every registered method and store inherits: their variants, and what architectures support."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache as cache_of
from itertools import product
from typing import Any

import pytest
import torch
import zoo
from _pytest.mark import ParameterSet
from published import gates_at_random

import keepkv
from keepkv.allocate.curves import RATIOS
from keepkv.allocate.profile import CURVE, FULL, MEASURED, PREFIX
from keepkv.calibrate import calibrate
from keepkv.calibrate.patterns import kv_heads
from keepkv.core.calibration import needed
from keepkv.engine.fingerprint import fingerprint
from keepkv.errors import CalibrationError, UnsupportedModel
from keepkv.methods import make_method
from keepkv.store import CODECS, STORES, choose

# Beyond a method's defaults: other choices that must hold the same invariants.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "keepkv": [{"key": "zip"}, {"key": "bias"}, {"key": "code"}, {"threshold": None, "score": "snapkv"}],
    "adakv": [{"score": "expected-attention"}, {"score": "keydiff"}],
    "compactor": [{"chunk": 8}],
    "dms": [{"score": "keydiff", "threshold": -0.1}],
    "kvzip": [{"plus": True, "allocate": "pooled"}],
    "random": [{"sinks": 0}],
    "non-causal-attention": [{"chunk": 8}],
    "lagkv": [{"cross": True}],
    "chunkkv": [{"spiky": 2}],
    "finch": [{"size": None}],
    "dropkv": [{"project": True}],
    "zeromerge": [{"residual": 3}],
    "kvslimmer": [{"score": "snapkv"}],
    "surface-logic-kv": [{"integration": "two_level", "behaviour": "copy_vs_compose"}],
    "duo-attention": [{"profile": "inf", "score": "keydiff"}],
}
SMALL = {"window": 4, "sinks": 2}  # so that tiny prompts leave something to choose
RUNS = {"lag": 4, "size": 4, "whole": 0}  # tokens of runs, where a method looks at these; layers that keep everything
LOSSY = {"int8": 0.2}  # of logits, where a codec loses something; 1 where it has fewer bits


def method_variants() -> list[Any]:
    """(name, options) of every registered method and variant, windows made small."""
    found = []
    for info in keepkv.methods():
        if info.name.startswith("test-"):
            continue
        # A prompt that is kept leaves nothing to choose either: tests/engine/test_long_replies.py has these.
        small = {k: v for k, v in (SMALL | RUNS | {"prompt": False}).items() if k in info.options}
        for extra in [{}, *VARIANTS.get(info.name, [])]:
            label = "-".join([info.name, *map(str, extra.values())])
            found.append(pytest.param((info.name, {**small, **extra}), id=label))
    return found


CALIBRATED = {"oscar": "oscar", "sals": "sals"}  # the kind of calibration that a codec is made with
MIXED = ("int4", "kivi", "sals")  # with these some slots stay exact beside the codes
EXACT: dict[str, Any] = {"exact_first": 3, "exact_last": 5, "exact_protected": True}
UNCALIBRATED: dict[str, dict[str, Any]] = {"tada": {"codec_options": {"centre": True}}}  # what else they take


def store_variants() -> list[Any]:
    """(name, options) of three methods, of equal and of ragged heads, with every pair of a layout and a codec that
    works and is not the method's own."""
    found = []
    for name, (layout, codec) in product(("snapkv", "keepkv", "adakv"), product(STORES, CODECS)):
        ragged = name == "adakv"
        try:
            choose(layout, codec, ragged)
        except keepkv.KeepKVError:
            continue  # refused as it should be: test_stores
        if (layout, codec) != ("ragged" if ragged else "dense", "none"):
            more = {"store_options": {"capacity": 96}} if layout == "static" else {}
            more |= UNCALIBRATED.get(codec, {})
            mine = {**EXACT, "exact_merged": 2} if name == "keepkv" else EXACT
            more |= {"store_options": mine} if codec in MIXED else {}
            label = "-".join((name, layout, codec))
            found.append(pytest.param((name, {**SMALL, "store": layout, "codec": codec, **more}), id=label))
    return found


METHODS = method_variants()
ARCHITECTURES = list(zoo.ZOO)
# Full attention, attention sinks, latents, layers that share slots beside ones with a sliding window.
STORE_ARCHITECTURES = ["llama", "gpt-oss", "deepseek-v3", "gemma4"]


PART = 16  # of the pairs of a method and an architecture, one in so many is in the quick suite


def cases(metafunc: pytest.Metafunc) -> list[Any]:
    """Every method on every architecture, and stores. In the quick suite one in ``PART``, others for each test of a
    file: every test sees every method and every architecture, and all tests together most pairs of both. Of stores
    every test sees half, each on one architecture."""
    tests = [name for name in vars(metafunc.module) if name.startswith("test_")]
    number = tests.index(metafunc.function.__name__)
    stores = sampled(2 * len(STORE_ARCHITECTURES), STORE_ARCHITECTURES, store_variants(), first=number)
    return sampled(PART, ARCHITECTURES, METHODS, first=number) + stores


def sampled(part: int, *factors: Sequence[Any], first: int = 0) -> list[Any]:
    """Every combination of ``factors``, of which one in ``part`` is in the quick suite: of any two factors every pair,
    where the others have ``part`` values or more; others for another ``first``. Values may be a ``pytest.param``."""
    made = []
    for numbers in product(*(range(len(one)) for one in factors)):
        chosen = [factor[i] for factor, i in zip(factors, numbers, strict=True)]
        values = [x.values[0] if isinstance(x, ParameterSet) else x for x in chosen]
        label = "-".join(str(x.id) if isinstance(x, ParameterSet) else str(x) for x in chosen)
        marks: Any = [] if (first + sum(numbers)) % part == 0 else pytest.mark.slow
        made.append(pytest.param(*values, id=label, marks=marks))
    return made


def tolerance(method: tuple[str, dict[str, Any]], exact: float = 1e-5) -> float:
    """How far logits may be from those of a cache that writes slots as they are."""
    name = method[1].get("codec", "none")
    if name in CALIBRATED:
        return 1.0
    codec, x = CODECS.build(name, **method[1].get("codec_options", {})), torch.linspace(-1, 1, 64).view(1, 1, 1, 64)
    known = codec.learn(x, x, x[..., 0] < 2, {})
    same = all(map(torch.equal, codec.read(*codec.write(x, x, x[..., 0] < 2, known)), (x, x)))
    return exact if same else LOSSY.get(name, 1.0)


def cache(name: str, method: tuple[str, dict[str, Any]], budget: Any, **options: Any) -> keepkv.Cache:
    """A cache for architecture ``name``; skips the pair where the refusal is part of the contract."""
    model = zoo.model(name)
    try:
        known = {"calibration": calibration(method, model)}
        return keepkv.Cache(model, method[0], budget, **{**method[1], **options, **known})
    except (UnsupportedModel, CalibrationError) as error:
        assert name == "deepseek-v3" and "latent" in str(error), error  # merging where keys and values are one
        pytest.skip(f"refused as it should be: {error}")


def made(model: Any, name: str, budget: Any = None, **options: Any) -> keepkv.Cache:
    """A cache for ``model``, with the calibration that the method needs, if it does."""
    return keepkv.Cache(model, name, budget, calibration=calibration((name, options), model), **options)


def calibration(method: tuple[str, dict[str, Any]], model: Any) -> keepkv.Calibration | None:
    """What the score, the allocation or the codec of a variant needs to know of ``model``, from a few random tokens."""
    chosen = make_method(method[0], {k: x for k, x in method[1].items() if k == "score"})
    kind = CALIBRATED.get(method[1].get("codec", ""), next(iter(needed(chosen.score, chosen.allocate)), None))
    return None if kind is None else _calibration(kind, model)


@cache_of
def _calibration(kind: str, model: Any) -> keepkv.Calibration:
    if kind == "heads":
        return random_profile(model)
    if kind == "fast-kvzip":
        return gates_at_random(model)
    ids = torch.randint(3, zoo.VOCAB, (6, 2, 40), generator=torch.Generator().manual_seed(0))
    return calibrate(kind, model, ids if kind in ("gates", "kvzap") else ids[:1])


def random_profile(model: Any, seed: int = 0) -> keepkv.Calibration:
    """A calibration "heads" of numbers at random: a model that answers nothing has no other."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for i, heads in kv_heads(model).items():
        tensors[i] = {PREFIX + name: torch.rand(heads, generator=generator) for name in (*MEASURED, FULL)}
        tensors[i][PREFIX + CURVE] = torch.rand(RATIOS, heads, generator=generator)
    return keepkv.Calibration("heads", tensors, fingerprint(model), {})


def compresses(method: tuple[str, dict[str, Any]]) -> bool:
    """Whether a method ever compresses."""
    return method[0] != "full"
