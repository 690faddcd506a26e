"""``keepkv.check``: it says what a cache would do, from a model or from its configuration alone."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch
import transformers as t
import zoo

import keepkv
from keepkv.engine.shrink import shrink
from keepkv.errors import UnsupportedModel


@pytest.mark.parametrize("arch", ["llama", "gemma4", "deepseek-v3", "qwen2-vl", "gpt-neox"])
def test_it_says_what_a_cache_does(arch: str) -> None:
    """For every method: the layers of the model and of its configuration are those that a cache takes over."""
    model = zoo.model(arch)
    before = model.config.get_text_config(decoder=True)._attn_implementation
    of_model, of_config = keepkv.check(model), keepkv.check(model.config)
    assert model.config.get_text_config(decoder=True)._attn_implementation == before
    assert of_model == of_config and of_model.refused is None
    for info in keepkv.methods():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cache = keepkv.Cache(model, info.name, None if info.name == "full" else 14)
        except UnsupportedModel:
            assert info.name in of_config.refused_methods
        except keepkv.KeepKVError:
            continue  # it needs an option or a calibration, whatever the model
        else:
            assert info.name not in of_config.refused_methods
            assert [x.index for x in of_config.layers if x.compressed] == [x.info.index for x in cache.compressible]


def test_a_large_configuration_takes_seconds_and_no_weights() -> None:
    """70B: layers as they are, shape of the real heads."""
    config = t.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    begun, state = time.perf_counter(), torch.get_rng_state()
    found = keepkv.check(config)
    assert time.perf_counter() - begun < 30
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() == torch.float32
    assert [layer.compressed for layer in found.layers] == [True] * 80
    assert str(found).endswith("all 80 layers  full attention, 8 KV heads × 128: compressed")


def test_equal_layers_are_told_together() -> None:
    lines = str(keepkv.check(t.Gemma3TextConfig(num_hidden_layers=26))).splitlines()
    assert lines[1] == "layers 0, 1, 2, 3 … (22)  sliding window, 4 KV heads × 256: as transformers keeps it"
    assert lines[2] == "layers 5, 11, 17, 23      full attention, 4 KV heads × 256: compressed"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (t.T5Config(), "encoder-decoder"),
        (t.BloomConfig(n_layer=2), "attention interface"),
        (t.ViTConfig(), "generates text"),
    ],
    ids=["encoder-decoder", "no interface", "no text"],
)
def test_refusals_are_told_and_not_raised(config: Any, reason: str) -> None:
    found = keepkv.check(config)
    assert reason in str(found.refused) and not found.layers and "refused" in str(found)


def test_methods_that_a_model_is_refused_for() -> None:
    """Merging on latents; undoing a rotation that depends on the length of the input."""
    latent = keepkv.check(zoo.model("deepseek-v3").config).refused_methods
    assert "latent" in latent["keepkv"] and "snapkv" not in latent
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = t.LlamaConfig(**{**zoo._BASE, "rope_parameters": dynamic})
    found = keepkv.check(config).refused_methods
    assert "dynamic" in found["expected-attention"] and "snapkv" not in found


@pytest.mark.parametrize("name", ["FalconH1Config", "MistralConfig"])
def test_full_attention_that_stays_is_told(name: str) -> None:
    """Beside a recurrent state it grows, and a note says so; a sliding window does not."""
    found = keepkv.check(getattr(t, name)(num_hidden_layers=2))
    assert not any(layer.compressed for layer in found.layers) and found.notes
    assert ("beside a recurrent state" in str(found)) == (name == "FalconH1Config")


def test_a_small_configuration_keeps_layers_and_rotations() -> None:
    config = t.Gemma3TextConfig(num_hidden_layers=12)
    small = shrink(config)
    assert small.layer_types == config.layer_types and small.rope_parameters == config.rope_parameters
    assert small.head_dim == config.head_dim and small.hidden_size == 64 and config.hidden_size > 64
    assert shrink(config, 1).layer_types == ["sliding_attention", "full_attention"]
