"""Tiny random-weight models, one per architecture, for the test matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as t
from transformers import PreTrainedModel

VOCAB = 128
_BASE = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
_HYBRID = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_HYBRID_BASE = {**_BASE, "num_hidden_layers": 4, "sliding_window": 16, "head_dim": 16, "layer_types": _HYBRID}
_SHARED = dict(
    num_hidden_layers=6,
    layer_types=["sliding_attention", "full_attention"] * 3,
    num_kv_shared_layers=2,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=VOCAB,
)
_MLA = dict(
    q_lora_rank=24,
    kv_lora_rank=32,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    moe_intermediate_size=32,
    num_key_value_heads=4,
)
_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
_VL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}


def _gemma4() -> PreTrainedModel:
    config = t.Gemma4TextConfig(**{**_HYBRID_BASE, **_SHARED}, global_head_dim=16, enable_moe_block=False)
    return t.Gemma4ForCausalLM(config)


def _qwen2_vl() -> PreTrainedModel:
    text = {**_BASE, "rope_parameters": _VL_ROPE}
    vision = dict(depth=1, embed_dim=32, num_heads=2, hidden_size=64, mlp_ratio=2)
    config = t.Qwen2VLConfig(text_config=text, vision_config=vision, vocab_size=VOCAB)
    return t.Qwen2VLForConditionalGeneration(config)


def _phi3() -> PreTrainedModel:
    return t.Phi3ForCausalLM(t.Phi3Config(**_BASE))


def _neox() -> PreTrainedModel:
    config = {k: v for k, v in _BASE.items() if k != "num_key_value_heads"}
    return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**config))


def _of(model: str, config: str, **changes: Any) -> Callable[[], PreTrainedModel]:
    return lambda: getattr(t, model)(getattr(t, config)(**{**_BASE, **changes}))


ZOO: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _of("LlamaForCausalLM", "LlamaConfig"),
    "mistral": _of("MistralForCausalLM", "MistralConfig", sliding_window=None),
    "qwen2": _of("Qwen2ForCausalLM", "Qwen2Config"),
    "qwen3": _of("Qwen3ForCausalLM", "Qwen3Config", head_dim=16),
    "qwen3-moe": _of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", head_dim=16, **_MOE),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**_HYBRID_BASE)),
    "gemma4": _gemma4,
    "phi3": _phi3,
    "gpt-neox": _neox,
    "gpt-oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(**{**_HYBRID_BASE, "num_local_experts": 4, "num_experts_per_tok": 2})
    ),
    "deepseek-v3": _of("DeepseekV3ForCausalLM", "DeepseekV3Config", **_MLA),
    "qwen2-vl": _qwen2_vl,
}


@cache
def model(name: str) -> PreTrainedModel:
    """The tiny model of architecture ``name``, float32, evaluation mode; the same object every time."""
    torch.manual_seed(0)
    made = ZOO[name]().eval()
    with torch.no_grad():
        for parameter_name, parameter in made.named_parameters():
            if parameter_name.endswith("k_norm.weight"):  # or every normalised key has the same norm, and knorm ties
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() > 1 and "embed" not in parameter_name:
                parameter.mul_(3.0)  # random weights attend almost evenly: sharpen, so that the choice matters
    return made
