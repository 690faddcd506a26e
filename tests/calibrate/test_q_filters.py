"""Filters of queries: the direction that singular vectors find, and those that the authors published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import zoo
from safetensors.torch import save_file
from torch import Tensor

import keepkv
from keepkv.calibrate import calibrate
from keepkv.core.slots import LayerView
from keepkv.engine.versions import CACHE
from keepkv.errors import CalibrationError

IDS = torch.randint(3, zoo.VOCAB, (3, 2, 40), generator=torch.Generator().manual_seed(1))
SEEN: dict[int, list[Tensor]] = {}


@dataclass(frozen=True)
class Listen(keepkv.Score):
    observes: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        SEEN.setdefault(view.layer, []).append(view.queries.double())


def test_filters_are_the_first_singular_vectors_of_the_queries() -> None:
    model = zoo.model("llama")
    made = calibrate("q-filters", model, IDS)
    SEEN.clear()
    for ids in IDS:
        cache = keepkv.Cache(model, keepkv.Method(Listen()), 1.0)
        with torch.no_grad():
            model(input_ids=ids, **{CACHE: cache.copy(observing=True)})
    for layer, found in SEEN.items():
        queries = torch.cat([x.transpose(0, 1).flatten(1, 2) for x in found], dim=1)  # (H*G, all tokens, D)
        wanted = []
        for own in queries:
            main = torch.linalg.svd(own, full_matrices=False).Vh[0]
            wanted.append(-main if float((own @ main).mean()) > 0 else main)
        by_head = torch.stack(wanted).view(2, 2, -1).mean(1)
        torch.testing.assert_close(made.tensors[layer]["qfilter"].double(), by_head, rtol=1e-4, atol=1e-5)


def test_published_filters_are_read(tmp_path: Path) -> None:
    model, held = zoo.model("llama"), torch.randn(3, 2, 16)
    save_file({"q_filters": held}, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        made = calibrate("q-filters", model, IDS[:0], published=str(path))
        assert all(torch.equal(made.tensors[i]["qfilter"], held[i]) for i in range(3))
    cache = keepkv.Cache(model, "q-filter", 14, calibration=made, window=2)
    with torch.no_grad():
        model(input_ids=IDS[0], **{CACHE: cache})
    assert cache.report().compressed


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    model = zoo.model("llama")
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CalibrationError, match="cannot be read"):
        calibrate("q-filters", model, IDS[:0], published=str(tmp_path))
    save_file({"q_filters": torch.zeros(2, 2, 16)}, tmp_path / "model.safetensors")
    with pytest.raises(CalibrationError, match=r"with layer 2, found \(2, 2, 16\)"):
        calibrate("q-filters", model, IDS[:0], published=str(tmp_path))
