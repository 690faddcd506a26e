"""Tiny random models and prompts. Their weights are sharpened, so that attention is not almost uniform."""

from __future__ import annotations

import torch
import transformers as t
from torch import Tensor
from transformers import PreTrainedModel

VOCAB = 128
_BASE = {
    "vocab_size": VOCAB,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.04,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_SMALL = {**_BASE, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 16}
_WIDE = {**_BASE, "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 64}

MODELS = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**{**_SMALL, "num_key_value_heads": 4})),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_SMALL)),
    "llama-gqa": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_WIDE)),
}
# Prompt lengths of each model, and the window of the methods that have one: below the smallest budget.
LENGTHS = {"llama": {100: 8, 257: 16}, "qwen3": {100: 8, 257: 16}, "llama-gqa": {600: 32}}


def make(name: str, seed: int) -> PreTrainedModel:
    """The model ``name`` with weights of ``seed``: float32, matrices times 3, norm weights not all equal."""
    torch.manual_seed(seed)
    model: PreTrainedModel = MODELS[name]().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "embed" not in parameter_name and "lm_head" not in parameter_name:
                parameter.mul_(3.0)
    return model


def prompt(length: int, seed: int) -> Tensor:
    """(1,length) random ids, special ones left out."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(3, VOCAB, (1, length), generator=generator)


def make_wide(head_dim: int) -> PreTrainedModel:
    """A Llama of two layers with heads of a usual size, for bytes."""
    torch.manual_seed(0)
    shape = {**_WIDE, "num_hidden_layers": 2, "head_dim": head_dim, "hidden_size": 4 * head_dim}
    model: PreTrainedModel = t.LlamaForCausalLM(t.LlamaConfig(**shape)).eval()
    return model
