"""The architecture of the embedded vision-language model, and its tokenizer of whole words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.embedded_model.network import Weights, init_weights, through
from keepkv.tasks.scenes import CELLS, SIDE, WORDS

PAD, BOS, EOS, UNKNOWN, IMAGE = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
BACK = (1, 2, 5, CELLS)  # tokens that heads of the first layer look back at first: words, and the frame before
TEXT = "model.language_model."
CONSTANT = 0.75  # in dimension 0 of every embedded token: what such heads read


def make_tokenizer() -> Any:
    """One token for each word of ``keepkv.tasks.scenes.WORDS``."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *WORDS]))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN,
        extra_special_tokens=[IMAGE], model_max_length=4096,
    )  # fmt: skip


def make_model(tokenizer: Any, seed: int = 0) -> Any:
    """A LLaVA with fresh weights: a CLIP tower to which a cell is a patch, and a Llama of four layers.

    The Llama begins as the embedded text model does, with heads that look back.
    """
    from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    special = {f"{token}_token_id": i for i, token in enumerate(("pad", "bos", "eos"))}
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 3, "image_size": SIDE, "patch_size": 16, "projection_dim": 96,
    }  # fmt: skip
    language = {
        "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "tie_word_embeddings": True, "rms_norm_eps": 1e-5, **special,
    }  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=language, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=CELLS, vision_feature_layer=-1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**special)
    fresh = init_weights(config.text_config, seed, BACK)
    state = {TEXT + name.removeprefix("model."): value for name, value in fresh.items()}
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() in (2, 4) and not name.startswith(TEXT):
                value.normal_(0, 0.5 if "position" in name else value[0].numel() ** -0.5)
        model.model.multi_modal_projector.linear_2.bias[0] = CONSTANT
    return model


def text_weights(model: Any) -> Weights:
    """Parameters of the Llama by the names that ``benchmarks.embedded_model.network`` reads."""
    return {"model." + n.removeprefix(TEXT): p for n, p in model.named_parameters() if n.startswith(TEXT)}


def features(model: Any, pixels: Tensor) -> Tensor:
    """Embedded cells (N,CELLS,C) of frames."""
    return torch.stack(list(model.model.get_image_features(pixels).pooler_output))


def hidden(model: Any, ids: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
    """Final hidden states (B,T,C) of token ids (B,T) at rotary ``positions`` (B,T), with ``features`` (N,CELLS,C)."""
    config = model.config.text_config
    x = model.get_input_embeddings()(ids)
    x = x.masked_scatter((ids == model.config.image_token_id)[..., None], seen)
    d = config.head_dim
    inverse = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, d, 2).float() / d)
    angle = (positions[..., None].float() * inverse).repeat(1, 1, 2)[:, None]
    return through(text_weights(model), config, x, angle.cos(), angle.sin())
