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
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
_GLM_V = {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}}}
_COMPASS = {"rope_parameters": {"full_attention": _ROPE}}
_UNSATURATED = {"attention_multiplier": 0.1}  # or attention is all on one token, and which others stay is a tie
_MAMBA: dict[str, Any] = {"mamba_n_heads": 16, "mamba_d_head": 64}

# What the default configuration lacks, by model class.
GIVEN: dict[str, dict[str, Any]] = {
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 120}},
    "CohereCompassForCausalLM": _COMPASS,
    "CohereCompassForConditionalGeneration": {"text_config": _COMPASS},
    "DeepseekOcr2ForConditionalGeneration": {
        "text_config": {"mlp_layer_types": ["dense"] * 32, "num_experts_per_tok": 2}
    },
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2},
    "DiffusionGemmaForBlockDiffusion": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
    },
    "Dots1ForCausalLM": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": 120}},
    "Gemma4AssistantForCausalLM": {"text_config": {"hidden_size_per_layer_input": 0}},
    "Glm46VForConditionalGeneration": _GLM_V,
    "Glm4vForConditionalGeneration": _GLM_V,
    "Glm4vMoeForConditionalGeneration": {"text_config": {**_GLM_V["text_config"], "head_dim": 128}},
    "Granite4VisionForConditionalGeneration": {"deepstack_layer_map": [], "downsample_rate": "1/2"},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 32},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 32},
    "HunYuanVLForConditionalGeneration": {
        "text_config": {"head_dim": 32, "rope_parameters": {**_ROPE, "mrope_section": [4, 4, 4, 4]}}
    },
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 16},
    "MinistralForCausalLM": {"head_dim": 32},
    "Molmo2ForConditionalGeneration": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "NemotronForCausalLM": {"num_key_value_heads": 8},
    "Qwen2_5OmniThinkerForConditionalGeneration": {"vision_start_token_id": 151652},
    "Qwen3OmniMoeThinkerForConditionalGeneration": {"vision_start_token_id": 151652},
    "Step3p7ForConditionalGeneration": {"text_config": {"sliding_window": 512}},
}
# Values of the small text part that do not follow from the others.
SMALL: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {**_MAMBA, "num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "BltForCausalLM": {"encoder_hash_byte_group_vocab": 128},
    "DoryForCausalLM": {"n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2},
    "FalconH1ForCausalLM": {"mamba_n_heads": 16, "mamba_d_ssm": 128},
    "GraniteMoeHybridForCausalLM": {**_MAMBA, "layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "GraniteSpeechForConditionalGeneration": _UNSATURATED,
    "GraniteSpeechPlusForConditionalGeneration": _UNSATURATED,
    "HeliumForCausalLM": {"hidden_size": 512},
    "HrmTextForCausalLM": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "JambaForCausalLM": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "Mamba2ForCausalLM": {"num_heads": 2, "n_groups": 1},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm2VlForConditionalGeneration": {"layer_types": ["conv", "full_attention"]},
    "MllamaForCausalLM": {"cross_attention_layers": [1]},
    "MllamaForConditionalGeneration": {"cross_attention_layers": [1]},
    "ReformerModelWithLMHead": {"axial_pos_embds": False},
    "Zamba2ForCausalLM": {"attention_hidden_size": 640, "mamba_headdim": 80, "hybrid_layer_ids": [2, 3]},
    "ZambaForCausalLM": {"attention_hidden_size": 1856},
    "xLSTMForCausalLM": {"embedding_dim": 64, "num_blocks": 2},
}
# Not tried, and why.
_AGREE = "parts of it must agree in sizes that are not made small together"
_LACKS = "the default configuration of transformers has no model"
NOT_TRIED: dict[str, str] = {
    "Apertus1p5ForConditionalGeneration": _AGREE,
    "DbrxForCausalLM": _LACKS,
    "DiffusionGemmaForBlockDiffusion": "writes blocks of tokens by diffusion, not one after the other",
    "Dots3NoteForConditionalGeneration": _AGREE,
    "FastVlmForConditionalGeneration": "needs the package timm",
    "FunAsrNanoForConditionalGeneration": _AGREE,
    "Gemma3nForConditionalGeneration": "needs the package timm",
    "Gemma4AssistantForCausalLM": _LACKS,
    "KyutaiSpeechToTextForConditionalGeneration": _AGREE,
    "Nemotron3_5TranscribeForConditionalGeneration": _AGREE,
    "PerceptionLMForConditionalGeneration": "needs the package timm",
    "Qwen2_5OmniForConditionalGeneration": "generates text and speech by a method of its own",
    "Qwen3OmniMoeForConditionalGeneration": _LACKS,
    "Qwen4ExpForCausalLM": _LACKS,
    "Qwen4ExpForConditionalGeneration": _LACKS,
}


def architectures() -> list[str]:
    """Every model class that generates text, sorted."""
    names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()}
    return sorted(names - NOT_TRIED.keys(), key=str.lower)


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
