"""What reinforcement learning refuses: one clear line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from keepkv.errors import KeepKVError

pytest.importorskip("trl")
pytest.importorskip("datasets")

import rl_setup


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_iterations": 2}, "num_iterations=2: what is evicted follows the weights"),
        ({"steps_per_generation": 4}, "steps_per_generation=4 with gradient_accumulation_steps=2"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"mask_truncated_completions": True}, "overlong='zero'"),
        ({"repetition_penalty": 1.1}, "another distribution"),
        ({"bf16": True}, "bfloat16 on a CPU"),
    ],
)
def test_settings(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(KeepKVError, match=said):
        rl_setup.trainer(tmp_path, **given)


def test_a_reference_model(tmp_path: Path) -> None:
    """TRL would load one from a directory first: the settings are looked at before."""
    rl_setup.tiny().save_pretrained(tmp_path / "model")
    model = type(rl_setup.tiny()).from_pretrained(tmp_path / "model")
    with pytest.raises(KeepKVError, match=r"beta=0\.1: the reference model would evict other tokens"):
        rl_setup.trainer(tmp_path, model, beta=0.1)


def test_half_precision_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(KeepKVError, match=r"bfloat16 on a CPU: .*torch\.float32"):
        rl_setup.trainer(tmp_path, rl_setup.tiny().to(torch.bfloat16))


def test_a_method_that_merges(tmp_path: Path) -> None:
    with pytest.raises(KeepKVError, match="'keepkv' merges slots"):
        rl_setup.trainer(tmp_path, compress=rl_setup.cache("keepkv", 48))


def test_a_frozen_model(tmp_path: Path) -> None:
    with pytest.raises(KeepKVError, match="no parameter of the model takes a gradient"):
        rl_setup.trainer(tmp_path, rl_setup.tiny().requires_grad_(False))


def test_part_of_a_distribution_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"top_p=0\.9: .*a small bias"):
        rl_setup.trainer(tmp_path, top_p=0.9)
