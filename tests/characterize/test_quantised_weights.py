"""Weights that are quantised by a library, where it is installed: smaller, and asked in a forward like any others."""

from __future__ import annotations

from pathlib import Path

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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_a_checkpoint_of_another_library_answers_almost_as_before(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four bits, written and read by GPT-QModel, which transformers loads both kinds with; on a CPU too."""
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "4")  # by itself it asks one core for two
    monkeypatch.chdir(tmp_path)  # where it writes its logs
    library = pytest.importorskip("gptqmodel")
    path, text = str(keepkv.embedded_model()), demo_document()[0]
    kinds = {"gptq": {}, "awq": {"method": "awq", "format": "gemm"}}
    made = library.GPTQModel.load(path, library.QuantizeConfig(bits=4, group_size=32, **kinds[kind]), device="cpu")
    made.quantize([text[i : i + 1500] for i in range(0, 30_000, 1500)], batch_size=1)
    made.save(str(tmp_path))
    found = []
    for weights in ("none", f"checkpoint:{tmp_path}"):
        model, tokenizer = load(path, weights, Hardware(dtype="float32"))
        ids, cache = tokenizer(text[:1500], return_tensors="pt").input_ids, keepkv.Cache(model, "snapkv", 0.5)
        with torch.no_grad():
            found.append(model(ids, **{CACHE: cache}).logits[0].argmax(-1))
            after = model(ids[:, :1], **{CACHE: cache}).logits
        assert cache.report().ratio < 0.75 and torch.isfinite(after).all()
    assert type(model.model.layers[0].mlp.up_proj) is not torch.nn.Linear
    assert SAME["int4"] < float((found[0] == found[1]).float().mean()) < 1
