"""Scores that may be below zero say so, and what multiplies scores refuses them at once."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import matrix
import pytest
import torch
import zoo

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.errors import KeepKVError
from keepkv.methods import apply
from keepkv.score import SCORES, ChunkKV, SnapKV


def test_scores_below_zero_are_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every registered score, over a prompt and decoded tokens."""
    model, least, checked = zoo.model("llama"), defaultdict[str, float](float), apply.checked_scores
    ids, name = torch.randint(3, zoo.VOCAB, (2, 60)), ""

    def watched(score: Any, view: Any, scores: Any, *more: Any) -> Any:
        out = checked(score, view, scores, *more)
        least[name] = min(least[name], float(out[view.slots.valid].min()))
        return out

    monkeypatch.setattr(apply, "checked_scores", watched)
    signed = {}
    for name in [one for one in SCORES if not one.startswith("test-")]:
        score = SCORES.build(name)
        signed[name], kind = score.signed, score.needs_calibration
        known = None if kind is None else matrix._calibration(kind, model)
        method = keepkv.Method(score, when=keepkv.When(every=3))
        try:
            cache = keepkv.Cache(model, method, 14, calibration=known)
            with torch.no_grad():
                for part in (ids, *ids[:, :6].split(1, dim=1)):
                    model(part, **{CACHE: cache})
        except KeepKVError:
            continue  # of vision, or of another reading: it has scored nothing here
    assert len(least) > 25
    assert {one for one, x in least.items() if x < 0} <= {one for one, x in signed.items() if x}


@pytest.mark.parametrize("score", ["keydiff", "knorm", "g-kv", "compactor", ChunkKV(SnapKV())])
def test_what_multiplies_scores_refuses_them_when_it_is_made(score: Any) -> None:
    """Before, when the first compression came."""
    with pytest.raises(KeepKVError, match="gives some below 0"):
        keepkv.Cache(zoo.model("llama"), "criticalkv", 0.5, score=score)
    keepkv.Cache(zoo.model("llama"), "criticalkv", 0.5, score="h2o")
