"""Kept slots against NVIDIA kvpress: same weights, same prompt, same counts, same choice.

The reference was written by ``benchmarks/kvpress/make_fixture.py`` in kvpress' own environment; ``docs/peers.md`` tells
where the two libraries differ and why.
"""

from __future__ import annotations

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.score import SCORES

DATA = Path(__file__).parents[1] / "data"
REFERENCE = json.loads((DATA / "peers.json").read_text("utf-8"))
CASES = REFERENCE["cases"]


@lru_cache(maxsize=1)
def tensors() -> dict[str, Tensor]:
    return load_file(DATA / "peers.safetensors")


@cache
def model(kind: str) -> PreTrainedModel:
    config = getattr(transformers, f"{kind}Config")(**REFERENCE["config"])
    made: PreTrainedModel = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    prefix = f"{kind}/weights/"
    weights = {name[len(prefix) :]: x.float() for name, x in tensors().items() if name.startswith(prefix)}
    missing = made.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}  # tied to the embedding
    return made


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    options = dict(case["options"])
    if isinstance(options.get("score"), dict):
        fields = dict(options["score"])
        options["score"] = SCORES.build(fields.pop("name"), **fields)
    return options


def run(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Kept slots (layers,H,S) uint8 after the prompt, and the logits of the last token fed after it."""
    made = model(case["model"])
    prompt, after = (tensors()[f"{case['model']}/{name}"].long()[None] for name in ("prompt", "next"))
    cache = keepkv.Cache(made, case["method"], case["budget"], **options_of(case))
    with torch.no_grad():
        made(prompt, **{CACHE: cache})
        kept = torch.zeros_like(tensors()[f"{case['name']}/kept"])
        for layer in range(kept.shape[0]):
            for head, held in enumerate(cache.kept_positions(layer)[0]):
                kept[layer, head, held[held >= 0].long()] = 1
        for token in after.unbind(1):
            logits = made(token[:, None], **{CACHE: cache}).logits
    return kept, logits[0, -1]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_keeps_what_kvpress_keeps(case: dict[str, Any]) -> None:
    kept, logits = run(case)
    expected = tensors()[f"{case['name']}/kept"]
    assert torch.equal(kept, expected), f"{int((kept != expected).sum())} slots differ"
    # The reference ran another version of transformers, so sums may be taken in another order.
    assert torch.allclose(logits, tensors()[f"{case['name']}/logits"], atol=1e-4)


def test_reference_is_not_vacuous() -> None:
    """Methods keep different slots, heads too, and what is dropped changes the logits."""
    kept = {case["name"]: tensors()[f"{case['name']}/kept"] for case in CASES}
    for kind in REFERENCE["models"]:
        choices = {kept[f"{kind}/{name}/0.5"].numpy().tobytes() for name in ("snapkv", "tova", "keydiff", "knorm")}
        assert len(choices) == 4
        adaptive = kept[f"{kind}/adakv(snapkv)/0.75"].sum(-1)
        assert adaptive.unique().numel() > 1 and bool((adaptive.sum(-1) == 2 * 30).all())
        assert not torch.equal(kept[f"{kind}/snapkv/0.75"][:, 0], kept[f"{kind}/snapkv/0.75"][:, 1])
