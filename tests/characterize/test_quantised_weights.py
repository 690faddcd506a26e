"""Weights that are quantised by a library, where it is installed: smaller, and asked in a forward like any others."""

from __future__ import annotations

import pytest
import torch

import keepkv
from keepkv.characterize.drive.weights import load
from keepkv.characterize.grid.levels import Hardware
from keepkv.characterize.grid.possible import NEEDS
from keepkv.engine.versions import CACHE
from keepkv.tasks import demo_document

SAME = {"int8": 0.95, "int4": 0.5}  # of the likeliest tokens: 4-bit weights of so small a model lose much by themselves


@pytest.mark.parametrize("weights", ["torchao-int8", "quanto-int8", "quanto-int4", "hqq-int8", "hqq-int4"])
def test_they_answer_almost_as_before(weights: str) -> None:
    library, _, kind = weights.partition("-")
    pytest.importorskip(NEEDS[library])
    path, hardware, text = str(keepkv.embedded_model()), Hardware(dtype="float32"), demo_document()[0][:1500]
    found = []
    for one in ("none", weights):
        model, tokenizer = load(path, one, hardware)
        ids, cache = tokenizer(text, return_tensors="pt").input_ids, keepkv.Cache(model, "snapkv", 0.5)
        with torch.no_grad():
            read = model(ids, **{CACHE: cache}).logits[0]
            after = model(ids[:, :1], **{CACHE: cache}).logits[0]
        assert cache.report().ratio < 0.75 and torch.isfinite(after).all()
        found.append(read.argmax(-1))
    assert SAME[kind] < float((found[0] == found[1]).float().mean()) < 1
