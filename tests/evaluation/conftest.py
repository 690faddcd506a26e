"""The embedded model, for tests of evaluations of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from keepkv.embedded import embedded_model


@pytest.fixture(scope="module")
def loaded() -> Any:
    """The model and its tokenizer."""
    path = embedded_model()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)
