"""Which tokens are still held, counted over layers and heads."""

from __future__ import annotations

import pytest
import torch
from zoo import VOCAB, model

import keepkv
from keepkv.core.survival import survival
from keepkv.engine.versions import CACHE


def test_by_hand() -> None:
    """Two layers of two and one heads; empty slots and tokens beyond those asked for count nowhere."""
    one = torch.tensor([[[0, 1, -1], [0, 2, 4]], [[3, -1, -1], [3, 0, 1]]])
    two = torch.tensor([[[0, 4, -1]], [[1, 2, 3]]])
    expected = torch.tensor([[3, 1, 1, 0], [1, 2, 1, 3]]) / 3
    torch.testing.assert_close(survival([one, two], 4), expected.double())


def test_it_counts_layers_and_heads_of_a_cache() -> None:
    cache = keepkv.Cache(model("llama"), "random", budget=20, sinks=4)
    with torch.inference_mode():
        model("llama")(input_ids=torch.randint(3, VOCAB, (1, 50)), **{CACHE: cache})
    [shares] = survival([cache.kept_positions(layer) for layer in cache.report().kept], 50)
    assert float(shares[:4].min()) == 1.0 and float(shares.sum()) == pytest.approx(20)
