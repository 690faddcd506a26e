"""The matrix that every registered method inherits: its variants, and what its architectures support."""

from __future__ import annotations

from typing import Any

import pytest
import zoo

import keepkv
from keepkv.errors import UnsupportedModel

# Beyond a method's defaults: other choices that must hold the same invariants.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "keepkv": [{"key": "zip"}, {"key": "bias"}, {"key": "code"}, {"threshold": None, "score": "snapkv"}],
    "adakv": [{"score": "expected-attention"}, {"score": "keydiff"}],
    "compactor": [{"chunk": 8}],
    "random": [{"sinks": 0}],
}
SMALL = {"window": 4, "sinks": 2}  # so that tiny prompts leave something to choose


def method_variants() -> list[Any]:
    """(name, options) of every registered method and variant, windows made small."""
    found = []
    for info in keepkv.methods():
        if info.name.startswith("test-"):
            continue
        small = {k: v for k, v in SMALL.items() if k in info.options}
        for extra in [{}, *VARIANTS.get(info.name, [])]:
            label = "-".join([info.name, *map(str, extra.values())])
            found.append(pytest.param((info.name, {**small, **extra}), id=label))
    return found


METHODS = method_variants()
ARCHITECTURES = list(zoo.ZOO)


def cache(name: str, method: tuple[str, dict[str, Any]], budget: Any, **options: Any) -> keepkv.Cache:
    """A cache for architecture ``name``; skips the pair where the refusal is part of the contract."""
    model = zoo.model(name)
    try:
        return keepkv.Cache(model, method[0], budget, **{**method[1], **options})
    except UnsupportedModel as error:
        assert name == "deepseek-v3" and "latent" in str(error), error  # merging where keys and values are one
        pytest.skip(f"refused as it should be: {error}")


def compresses(method: tuple[str, dict[str, Any]]) -> bool:
    """Whether a method ever compresses."""
    return method[0] != "full"
