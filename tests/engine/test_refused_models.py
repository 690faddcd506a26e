"""Models that a compressed cache cannot serve are refused when it is made, with the reason and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
import zoo
from running import batch, generate, row
from transformers import DynamicCache
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.errors import UnsupportedModel

_SHAPE: dict[str, Any] = dict(vocab_size=zoo.VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=None)
STATES = dict(mamba_d_state=8, n_mamba_heads=2)


def tiny(model: str, config: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(t, model)(getattr(t, config)(**_SHAPE, **options)).eval()


WITHOUT_INTERFACE = {
    "gptj": lambda: tiny("GPTJForCausalLM", "GPTJConfig", n_embd=32, n_layer=2, n_head=2, rotary_dim=8),
    "gpt-neo": lambda: tiny(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global"], 2]],
    ),
    "falcon": lambda: tiny(
        "FalconForCausalLM", "FalconConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=2
    ),
    "bloom": lambda: tiny("BloomForCausalLM", "BloomConfig", hidden_size=32, n_layer=2, n_head=2),
    "mpt": lambda: tiny("MptForCausalLM", "MptConfig", d_model=32, n_layers=2, n_heads=2),
    "codegen": lambda: tiny("CodeGenForCausalLM", "CodeGenConfig", n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
}


if CACHE == "cache":  # since then these two have the interface
    del WITHOUT_INTERFACE["gptj"], WITHOUT_INTERFACE["codegen"]


@pytest.mark.parametrize("name", WITHOUT_INTERFACE)
def test_models_without_the_attention_interface_are_refused(name: str) -> None:
    """When the cache is made, with the remedy; the model still works as before."""
    model = WITHOUT_INTERFACE[name]()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match="DynamicCache"):
        keepkv.Cache(model, "snapkv", 0.5)
    assert model.config._attn_implementation == before
    generate(model, row(batch(), 0), DynamicCache(config=model.config), new=2)


def test_encoder_decoder_and_indexed_models_are_refused() -> None:
    bart = t.BartForConditionalGeneration(
        t.BartConfig(
            vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        )
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        keepkv.Cache(bart, "snapkv", 0.5)
    config = t.GlmMoeDsaConfig(num_hidden_layers=2, hidden_size=32, vocab_size=99, num_attention_heads=4)
    with torch.device("meta"):
        indexed = t.GlmMoeDsaForCausalLM(config)
    with pytest.raises(UnsupportedModel, match="index over every token"):
        keepkv.Cache(indexed, "snapkv", 0.5)


def test_a_model_of_sliding_layers_has_nothing_to_compress() -> None:
    model = zoo.ZOO["mistral"]().__class__(t.MistralConfig(**{**zoo._BASE, "sliding_window": 16})).eval()
    with pytest.warns(UserWarning, match="nothing to compress"):
        cache = keepkv.Cache(model, "snapkv", 0.5)
    plain = generate(model, batch(), DynamicCache(config=model.config))
    assert torch.equal(generate(model, batch(), cache).sequences, plain.sequences)
    assert "nothing was compressed" in str(cache.report())


def hybrid(model: str, config: str, **options: Any) -> Any:
    shape = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32)
    return tiny(model, config, **{**shape, **options})


UNSERVED: dict[str, tuple[Any, str]] = {
    "diff-llama": (lambda: hybrid("DiffLlamaForCausalLM", "DiffLlamaConfig", num_hidden_layers=2), "on the keys"),
    "doge": (lambda: hybrid("DogeForCausalLM", "DogeConfig", num_hidden_layers=2), "outside the attention function"),
    "jetmoe": (
        lambda: hybrid(
            "JetMoeForCausalLM",
            "JetMoeConfig",
            num_hidden_layers=2,
            kv_channels=8,
            num_local_experts=2,
            num_experts_per_tok=1,
        ),
        "outside the attention function",
    ),
    "minimax": (
        lambda: hybrid(
            "MiniMaxForCausalLM",
            "MiniMaxConfig",
            num_hidden_layers=2,
            head_dim=8,
            num_local_experts=2,
            layer_types=["linear_attention", "full_attention"],
        ),
        "a cache class of its own",
    ),
    "mllama": (
        lambda: t.MllamaForCausalLM(
            MllamaTextConfig(
                **_SHAPE,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                intermediate_size=32,
                cross_attention_layers=[1],
            )
        ),
        "image encoder",
    ),
    "mamba": (lambda: tiny("MambaForCausalLM", "MambaConfig", hidden_size=32, num_hidden_layers=2), "recurrent state"),
    "mamba2": (
        lambda: tiny(
            "Mamba2ForCausalLM",
            "Mamba2Config",
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            num_heads=8,
            head_dim=8,
            n_groups=1,
        ),
        "recurrent state",
    ),
    "recurrent-gemma": (
        lambda: hybrid("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", num_hidden_layers=3, lru_width=32),
        "in its own modules",
    ),
    "linear": (lambda: torch.nn.Linear(2, 2), "no PreTrainedModel"),
    "data-parallel": (lambda: torch.nn.DataParallel(zoo.model("llama")), "model.module"),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_models_that_cannot_be_served_are_refused_when_the_cache_is_made(name: str) -> None:
    """With the true reason and the remedy in one line; the model is as it was, its state in the midst of a text too."""
    make, reason = UNSERVED[name]
    model = make().eval()
    before = {id(m): dict(m.__dict__) for m in model.modules()}
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    with pytest.raises(UnsupportedModel, match=reason) as error:
        keepkv.Cache(model, "knorm", 16)
    assert "\n" not in str(error.value)
    assert any(remedy in str(error.value) for remedy in ("Use transformers'", "Give "))
    assert getattr(getattr(model, "config", None), "_attn_implementation", None) == implementation
    for module in model.modules():
        assert module.__dict__.keys() == before[id(module)].keys()
        assert all(value is before[id(module)][key] for key, value in module.__dict__.items())


@pytest.mark.parametrize("name", ["FalconH1", "Zamba"])
def test_full_attention_beside_a_recurrent_state_is_named_as_not_compressed(name: str) -> None:
    """Before: "every layer has a sliding window, a recurrent state or no cache", which is not so."""
    options: dict[str, Any] = (
        dict(num_hidden_layers=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8)
        if name == "FalconH1"
        else dict(num_hidden_layers=6, attn_layer_period=3, attn_layer_offset=1, **STATES)
    )
    model = hybrid(f"{name}ForCausalLM", f"{name}Config", **options)
    plain = generate(model, row(batch(), 0), DynamicCache(config=model.config), new=3)
    with pytest.warns(UserWarning, match="full attention beside a recurrent state"):
        cache = keepkv.Cache(model, "knorm", 16)
    assert torch.equal(generate(model, row(batch(), 0), cache, new=3).sequences, plain.sequences)


def test_a_model_is_looked_at_once() -> None:
    """What a cache costs must not grow with the model: its forward runs to the first attention, the first time only."""
    model, runs = zoo.ZOO["llama"]().eval(), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: runs.append(0))
    model.model.layers[1].register_forward_pre_hook(lambda *_: runs.append(1))
    for _ in range(3):
        keepkv.Cache(model, "knorm", 16)
    assert runs == [0]
