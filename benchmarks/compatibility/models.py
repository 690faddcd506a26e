"""Every architecture of transformers that generates text, built small from its default configuration."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from keepkv.engine.shrink import shrink

LAYERS = 2  # of each kind
_MAMBA: dict[str, Any] = {"mamba_n_heads": 16, "mamba_d_head": 64}

# What the default configuration lacks, by model class; of a part where it is nested.
GIVEN: dict[str, dict[str, Any]] = {
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 120}},
    "CohereCompassForCausalLM": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "DeepseekOcr2ForConditionalGeneration": {
        "text_config": {"mlp_layer_types": ["dense"] * 32, "num_experts_per_tok": 2}
    },
    "DiffusionGemmaForBlockDiffusion": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
    },
    "Dots1ForCausalLM": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": 120}},
    "Granite4VisionForConditionalGeneration": {"deepstack_layer_map": []},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 32},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 32},
    "HunYuanVLForConditionalGeneration": {"text_config": {"head_dim": 32}},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 16},
    "MinistralForCausalLM": {"head_dim": 32},
    "Molmo2ForConditionalGeneration": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "NemotronForCausalLM": {"num_key_value_heads": 8},
}
# Values of the small text part that do not follow from the others.
SMALL: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {**_MAMBA, "num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "BltForCausalLM": {"encoder_hash_byte_group_vocab": 128},
    "DoryForCausalLM": {"n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2},
    "FalconH1ForCausalLM": {"mamba_n_heads": 16, "mamba_d_ssm": 128},
    "GraniteMoeHybridForCausalLM": {**_MAMBA, "layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "Mamba2ForCausalLM": {"num_heads": 2, "n_groups": 1},
    "ReformerModelWithLMHead": {"axial_pos_embds": False},
    "xLSTMForCausalLM": {"embedding_dim": 64, "num_blocks": 2},
}


def architectures() -> list[str]:
    """Every model class that generates text, sorted."""
    names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()}
    return sorted(names, key=str.lower)


def build(name: str) -> PreTrainedModel:
    """The small model of class ``name``: random weights, float32, evaluation mode."""
    kind = getattr(transformers, name)
    config = kind.config_class(**GIVEN.get(name, {}))
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    torch.manual_seed(0)
    model: PreTrainedModel = kind(shrink(config, LAYERS, **SMALL.get(name, {}))).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in parameter_name:
                parameter.mul_(3.0)  # random weights attend almost evenly: sharpen, so that the choice matters
    return model
