"""The same through a pipeline of transformers, and through ``generate(custom_generate=…)``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from test_context import ASKED, TEXT, loaded

import keepkv
from keepkv.embedded import embedded_model
from keepkv.errors import KeepKVError

HUB = Path(__file__).parents[2] / "examples" / "custom_generate"


def test_pipeline_gives_the_same_answers() -> None:
    expected = keepkv.ask(*loaded(), TEXT, ASKED[:2], budget=0.4, method="keydiff", max_new_tokens=6)
    pipe = transformers.pipeline("keepkv-ask", model=embedded_model(), budget=0.4, device="cpu")
    answers = pipe(TEXT, questions=ASKED[:2], method="keydiff", max_new_tokens=6)
    assert list(answers) == list(expected) and answers.receipt.bytes == expected.receipt.bytes
    several = pipe([TEXT, TEXT[:800]], questions=ASKED[0], method="keydiff", max_new_tokens=6)
    assert several[0][0] == expected[0] and len(several) == 2


def test_pipeline_without_questions_says_so() -> None:
    pipe = transformers.pipeline("keepkv-ask", model=embedded_model(), device="cpu")
    with pytest.raises(KeepKVError, match="no questions"):
        pipe(TEXT)


def test_custom_generate_compresses() -> None:
    """As the Hub takes it, from a local path."""
    model, tokenizer = loaded()
    inputs = tokenizer(TEXT + f"\n{ASKED[0]}", return_tensors="pt")
    made = model.generate(
        **inputs, custom_generate=str(HUB), trust_remote_code=True, method="keydiff", budget=0.3,
        max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
    )  # fmt: skip
    with keepkv.compressed(model, "keydiff", budget=0.3) as caches:
        own = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(made.sequences, own)
    cache = getattr(made, "cache", None) or made.past_key_values
    assert cache.report().ratio == caches[0].report().ratio < 0.35
