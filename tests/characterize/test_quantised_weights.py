"""Weights that are quantised by a library, where it is installed: smaller, and asked in a forward like any others."""

from __future__ import annotations

import pytest
import torch

import keepkv
from keepkv.characterize.drive.weights import load
from keepkv.characterize.grid.levels import Hardware
from keepkv.characterize.grid.possible import NEEDS
from keepkv.engine.versions import CACHE


@pytest.mark.parametrize("weights", ["torchao-int8", "quanto-int8", "quanto-int4", "hqq-int8", "hqq-int4"])
def test_they_answer_almost_as_before(weights: str) -> None:
    pytest.importorskip(NEEDS[weights.partition("-")[0]])
    path, hardware = str(keepkv.embedded_model()), Hardware(dtype="float32")
    ids = torch.arange(5, 205)[None]
    found = []
    for one in ("none", weights):
        model, _ = load(path, one, hardware)
        cache = keepkv.Cache(model, "snapkv", 0.5)
        with torch.no_grad():
            found.append(model(ids, **{CACHE: cache}).logits[0, -1].float().softmax(-1))
        assert cache.report().ratio < 0.75
    assert 0 < float((found[0] - found[1]).abs().sum()) < 0.5
