"""Shared set-up: one thread per worker, no network, quiet transformers."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers

if not torch.cuda.is_available():  # kernels run in Triton's interpreter, which must know before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
