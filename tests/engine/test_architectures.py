"""The wider study, run with ``-m slow``: every architecture that the engine is known to serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
import zoo
from running import LENGTHS, batch, generate, row
from transformers import DynamicCache, PreTrainedModel

import keepkv
from keepkv.engine.versions import CACHE

pytestmark = pytest.mark.slow
_HALF = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}


def of(name: str, **changes: Any) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        return getattr(t, f"{name}ForCausalLM")(getattr(t, f"{name}Config")(**{**zoo._BASE, **changes}))

    return make


def gpt2(name: str, **changes: Any) -> Callable[[], PreTrainedModel]:
    shape = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, **changes}
    base = {k: v for k, v in zoo._BASE.items() if k.endswith("_id") or k == "vocab_size"}
    return lambda: getattr(t, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(
        getattr(t, f"{name}Config")(**{**base, **shape})
    )


MORE: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**{**zoo._HYBRID_BASE, "query_pre_attn_scalar": 16})),
    "gemma3n": lambda: t.Gemma3nForCausalLM(
        t.Gemma3nTextConfig(
            **{
                **zoo._BASE, "head_dim": 16, "sliding_window": 16, "num_hidden_layers": 6, "num_kv_shared_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"] * 3, "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": zoo.VOCAB, "laurel_rank": 8, "activation_sparsity_pattern": None,
            }
        )
    ),
    "phi": of("Phi"),
    "gpt2": gpt2("GPT2"),
    "gpt-bigcode": gpt2("GPTBigCode"),
    "cohere2": of("Cohere2", **_HALF),
    "olmo2": of("Olmo2"),
    "stablelm": of("StableLm"),
    "granite": of("Granite"),
    "glm4": of("Glm4", head_dim=16),
    "smollm3": of("SmolLM3"),
    "opt": lambda: t.OPTForCausalLM(
        t.OPTConfig(
            vocab_size=zoo.VOCAB, hidden_size=64, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4,
            word_embed_proj_dim=64, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        )
    ),
    "llama4": lambda: t.Llama4ForCausalLM(
        t.Llama4TextConfig(
            **{
                **zoo._BASE, "num_hidden_layers": 4, "head_dim": 16, "attention_chunk_size": 16, "num_local_experts": 2,
                "intermediate_size_mlp": 64, "num_experts_per_tok": 1,
            }
        )
    ),
    "qwen3-next": lambda: t.Qwen3NextForCausalLM(
        t.Qwen3NextConfig(
            **{
                **zoo._BASE, "num_hidden_layers": 4, "head_dim": 16,
                "layer_types": ["linear_attention", "full_attention"] * 2,
                "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
                "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
            }
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("arch", MORE)
def test_plain_compressed_and_padded(arch: str) -> None:
    """Uncompressed: the tokens of the plain cache. Compressed, with periodic recompression: rows equal rows alone."""
    model = MORE[arch]().eval()
    plain = generate(model, batch(), DynamicCache(config=model.config.get_text_config()))
    full = generate(model, batch(), keepkv.Cache(model, "full"))
    assert torch.equal(full.sequences, plain.sequences)
    assert torch.allclose(full.scores_, plain.scores_, atol=1e-5)
    for method in ("snapkv", "keepkv", "adakv", "h2o"):
        for every in (None, 3):
            options = {"window": 4, "sinks": 2, "when": keepkv.When(every=every)}
            mine = keepkv.Cache(model, method, 14, **options)
            together = generate(model, batch(), mine)
            assert mine.report().compressed and not torch.equal(together.scores_, plain.scores_)
            for i in range(len(LENGTHS)):
                alone = generate(model, row(batch(), i), keepkv.Cache(model, method, 14, **options))
                assert torch.allclose(alone.scores_[0], together.scores_[i], atol=2e-5), (method, every, i)


def test_image_blocks_attend_in_both_directions() -> None:
    """Gemma 3 with images: a mask that is not plain causal holds on a compressed past too."""
    text = {**zoo._HYBRID_BASE, "vocab_size": 300}
    vision = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = t.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=299, boi_token_index=298,
        eoi_token_index=297,
    )  # fmt: skip
    torch.manual_seed(0)
    model = t.Gemma3ForConditionalGeneration(config).eval()
    ids = torch.randint(3, 290, (1, 40))
    ids[0, 20:24] = 299
    inputs = {
        "input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28), "token_type_ids": (ids == 299).long(),
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    with torch.no_grad():
        plain = model(**inputs, **{CACHE: DynamicCache(config=config.get_text_config())}).logits
        full = model(**inputs, **{CACHE: keepkv.Cache(model, "full")}).logits
        assert torch.allclose(full, plain, atol=1e-5)
        # The same prompt in two turns, the image in the second: with transformers' cache, with ours as it is, and on
        # a past that was loaded, so that the rule is applied to slots instead of columns.
        second = {name: x[:, 16:] if x.dim() == 2 else x for name, x in inputs.items() if name != "attention_mask"}
        outs = []
        for loaded in (None, False, True):
            cache = DynamicCache(config=config.get_text_config()) if loaded is None else keepkv.Cache(model, "full")
            model(input_ids=ids[:, :16], token_type_ids=inputs["token_type_ids"][:, :16], **{CACHE: cache})
            for layer in cache.compressible if loaded else ():
                layer.store.load(layer.store.view().map(torch.clone))
                layer.progress.compressed = True
            outs.append(model(**second, attention_mask=inputs["attention_mask"], **{CACHE: cache}).logits)
    assert torch.allclose(outs[1], outs[0], atol=1e-5) and torch.allclose(outs[2], outs[0], atol=1e-5)
