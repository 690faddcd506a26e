"""A forward that ended midway is never taken for a good one, whatever layers had its tokens already."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
import zoo
from matrix import SMALL
from running import generate
from test_rollback import ids

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.errors import CacheStateError

S, F, L = "sliding_attention", "full_attention", "linear_attention"
BASE = {**zoo._HYBRID_BASE}


def gemma(types: list[str]) -> Any:
    torch.manual_seed(0)
    config = {**BASE, "num_hidden_layers": len(types), "layer_types": types}
    return t.Gemma3ForCausalLM(t.Gemma3TextConfig(**config)).eval()


def qwen_next(types: list[str]) -> Any:
    torch.manual_seed(0)
    config = {k: v for k, v in BASE.items() if k not in ("sliding_window",)}
    linear = dict(
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
    )  # fmt: skip
    config = {**config, **linear, "num_hidden_layers": len(types), "layer_types": types}
    return t.Qwen3NextForCausalLM(t.Qwen3NextConfig(**config)).eval()


LAYOUTS = [
    (gemma, [S, S, F]),
    (gemma, [F, S, S]),
    (gemma, [S, F, S, F]),
    (qwen_next, [L, F, L]),
    (qwen_next, [L, L, F]),
]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("make, types", LAYOUTS, ids=lambda x: "".join(k[0] for k in x) if isinstance(x, list) else "")
def test_a_forward_that_failed_at_any_layer_is_refused(make: Any, types: list[str], tokens: int) -> None:
    """Without the guard: layers hold 44, 41 and 41 tokens, and the next logits are off by 0.34."""
    model = make(types)
    for place in range(len(types)):
        cache = keepkv.Cache(model, "snapkv", 14, **SMALL)
        with torch.no_grad():
            model(ids(40), **{CACHE: cache})
            hook = model.model.layers[place].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids(tokens, seed=2), **{CACHE: cache})
            hook.remove()
            whole = place == len(types) - 1  # every layer has the tokens
            if whole:
                model(ids(1), **{CACHE: cache})
                continue
            with pytest.raises(CacheStateError, match="failed midway"):
                model(ids(1), **{CACHE: cache})
            cache.reset()
            model(ids(40), **{CACHE: cache})


@pytest.mark.parametrize("make, types", LAYOUTS, ids=lambda x: "".join(k[0] for k in x) if isinstance(x, list) else "")
def test_one_that_failed_before_any_layer_is_forgotten(make: Any, types: list[str]) -> None:
    model = make(types)
    cache = keepkv.Cache(model, "snapkv", 14, **SMALL)
    with torch.no_grad():
        model(ids(40), **{CACHE: cache})
        expected = model(ids(1), **{CACHE: cache.copy()}).logits
        hook = model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
        for tokens in (1, 3):
            with pytest.raises(ZeroDivisionError):
                model(ids(tokens, seed=2), **{CACHE: cache})
        hook.remove()
        assert torch.equal(model(ids(1), **{CACHE: cache}).logits, expected)


SMALLEST: dict[str, Any] = dict(num_experts=2, num_experts_per_tok=1)
MAMBA2: dict[str, Any] = dict(mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=16)
RECURRENT: dict[str, dict[str, Any]] = {
    "Jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False, **SMALLEST),
    "Bamba": dict(attn_layer_indices=[1], **MAMBA2),
    "GraniteMoeHybrid": dict(
        layer_types=["mamba", "attention", "mamba"], num_local_experts=2, num_experts_per_tok=1,
        shared_intermediate_size=32, **MAMBA2,
    ),
    "Lfm2": dict(layer_types=["conv", F, "conv"]),
}  # fmt: skip


@pytest.mark.parametrize("name", RECURRENT)
def test_states_that_are_written_in_place_are_no_failure(name: str) -> None:
    """Decoding is as with transformers' own cache; before, the second decoded token was refused as after a failure."""
    torch.manual_seed(0)
    config = getattr(t, f"{name}Config")(**{**zoo._BASE, **RECURRENT[name]})
    model = getattr(t, f"{name}ForCausalLM")(config).eval()
    plain = generate(model, {"input_ids": ids(40)}, t.DynamicCache(config=config))
    out = generate(model, {"input_ids": ids(40)}, keepkv.Cache(model, "full"))
    assert torch.allclose(out.scores_, plain.scores_, atol=1e-5)
    cache = keepkv.Cache(model, "knorm", 16)
    generate(model, {"input_ids": ids(40)}, cache)
    assert cache.report().compressed
    with torch.no_grad():
        for tokens in (1, 3):
            twin = cache.copy()
            hook = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids(tokens, seed=2), **{CACHE: twin})
            hook.remove()
            with pytest.raises(CacheStateError, match="failed midway"):
                model(ids(1), **{CACHE: twin})
