"""SALS on text: whether a number of many digits that stands in it can still be read out."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import keepkv
from keepkv import embedded_model, tasks
from keepkv.calibrate import calibrate
from keepkv.core.calibration import Calibration
from keepkv.engine.versions import CACHE
from keepkv.tasks.asking import Encoded, encode

WHOLE = 64  # coordinates of the keys of a token


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)


def needles(seeds: range) -> list[Encoded]:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    return [encode(tokenizer, tasks.get("niah-single-3").generate(tokenizer, 384, seed)) for seed in seeds]


@cache
def calibration() -> Calibration:
    return calibrate("sals", model(), [torch.tensor([one.context]) for one in needles(range(100, 108))])


def read_out(select: str, rank: int, ranked: int, selected: int) -> tuple[float, float]:
    """Share of the tokens of replies, but for the first, that are the likeliest; and recall of the selection."""
    right, recalls = [], []
    for item in needles(range(4)):
        one = item.asked[0]
        made = keepkv.Cache(
            model(), "full", codec="sals", codec_options={"rank": rank, "ranked": ranked, "value_bits": 16},
            calibration=calibration(), select=select, selected=selected, select_options={"window": 8, "measure": 1},
        )  # fmt: skip
        with torch.no_grad():
            model()(input_ids=torch.tensor([[*item.context, *one.prompt]]), **{CACHE: made})
            for token, follows in zip(one.answer, one.answer[1:], strict=False):
                logits = model()(input_ids=torch.tensor([[token]]), **{CACHE: made}).logits[0, -1]
                right.append(int(logits.argmax()) == follows)
        found = made.report().selection
        assert found is not None and found.recall is not None and found.measured == len(one.answer) - 1
        recalls.append(found.recall)
    return sum(right) / len(right), sum(recalls) / len(recalls)


@pytest.mark.parametrize("select", ["codes", "latent"])
def test_needles_are_found_with_rank_with_coordinates_and_with_slots(select: str) -> None:
    by_rank = [read_out(select, rank, rank, 32)[0] for rank in (4, 16, WHOLE)]
    assert by_rank == sorted(by_rank) and by_rank[0] < 0.5 and by_rank[-1] > 0.95
    by_coordinates = [read_out(select, WHOLE, ranked, 32) for ranked in (4, 16, WHOLE)]
    by_slots = [read_out(select, WHOLE, WHOLE, selected) for selected in (2, 32, 128)]
    for found in (by_coordinates, by_slots):
        needle, recall = zip(*found, strict=True)
        assert list(needle) == sorted(needle) and list(recall) == sorted(recall)
