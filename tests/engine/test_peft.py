"""Models that PEFT has wrapped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_compressed import fresh, methods, run

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.errors import UnsupportedModel

peft: Any = pytest.importorskip("peft")


@pytest.mark.parametrize("kind", ["lora", "prompt", "p-tuning"])
def test_models_wrapped_by_peft(kind: str) -> None:
    """Before, the hook sat on the wrapper: no cache was made, nothing was compressed, nothing was said."""
    config = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "p-tuning": lambda: peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=8, token_dim=64, num_layers=3,
            num_attention_heads=4,
        ),
    }[kind]()  # fmt: skip
    model = peft.get_peft_model(fresh(), config).eval()
    base = model.get_base_model()
    plain, before = run(model, 6), base.config._attn_implementation
    with keepkv.compressed(model, "full") as caches:
        assert torch.equal(run(model, 6), plain)
    if kind == "lora" or CACHE == "past_key_values":  # else PEFT 0.21 itself reads its virtual tokens in every step
        assert [cache.report().seen for cache in caches] == [[61 + 5 + (0 if kind == "lora" else 5)]]
    with keepkv.compressed(model, "knorm", 16) as caches:
        run(model)
        run(model)
    assert methods(caches) == ["knorm"] * 2
    assert base.config._attn_implementation == before
    cache = keepkv.Cache(model, "knorm", 16)
    run(model, **{CACHE: cache})
    assert cache.report().compressed
    assert torch.equal(run(model, 6), plain)


def test_prefix_tuning_is_refused() -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(fresh(), config).eval()
    with pytest.raises(UnsupportedModel, match="PREFIX_TUNING"):
        keepkv.Cache(model, "knorm", 16)
    with pytest.raises(UnsupportedModel, match="PREFIX_TUNING"), keepkv.compressed(model, "knorm", 16):
        pass
