"""How a model rotates its keys, read off real model classes."""

from __future__ import annotations

import pytest
import torch
import transformers
import zoo
from packaging.version import Version
from rotations import rotations, tiny
from torch import nn
from ulp import ulps

import keepkv
from keepkv.core.rope import Rope
from keepkv.engine.rope_probe import UnknownRope, rope_of
from keepkv.engine.versions import CACHE
from keepkv.errors import UnsupportedModel

torch.set_num_threads(1)


# --- real model classes ------------------------------------------------------------------------------------------

FULL = {"layer_types": ["full_attention"] * 4}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 16}
ROPES = {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5,
          "original_max_position_embeddings": 128}  # fmt: skip
FAR = torch.tensor([[0, 1, 4_095, 131_071, 524_289, 999_999, 1_048_575]])
# name: class, configuration, rotated dims, interleaved
SPIED = {
    "llama": ("Llama", {}, 16, False),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}, 16, False),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}, 16, False),
    "qwen2": ("Qwen2", {}, 16, False),
    "qwen3": ("Qwen3", {"head_dim": 16}, 16, False),
    "phi3": ("Phi3", {}, 16, False),
    "gemma3": ("Gemma3", {**MIXED, "rope_parameters": ROPES}, 16, False),
    "gpt-neox": ("GPTNeoX", {}, 4, False),
    "cohere": ("Cohere", {}, 16, True),
    "glm": ("Glm", {"head_dim": 16}, 8, True),
    "gpt-oss": ("GptOss", {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, **FULL}, 16, False),
}


@pytest.mark.parametrize("name", SPIED)
def test_models_own_rotation_is_undone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys before RoPE, QK-norm included, come back from those after it, in every layer."""
    kind, changes, dims, interleaved = SPIED[name]
    model = tiny(kind, **changes)
    ropes = rope_of(model)
    seen = rotations(model, monkeypatch, torch.arange(1, 41)[None])
    assert list(ropes) == [0, 1, 2, 3] and len(seen) == 8
    for n, (before, after) in enumerate(seen):
        rope = ropes[n // 2]
        assert isinstance(rope, Rope) and (rope.dims, rope.interleaved) == (dims, interleaved)
        assert before.shape[2] == 40 and not torch.allclose(before, after)
        torch.testing.assert_close(rope.unrotate(after, torch.arange(40)), before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rope.rotate(before, torch.arange(40)), after, rtol=1e-4, atol=1e-5)
    if name == "gemma3":  # each kind of layer turns at its own speed
        assert not torch.equal(ropes[0].inv_freq, ropes[1].inv_freq)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", SPIED)
def test_rotations_far_away_are_the_models_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a million tokens, where an angle that is off by one part in a million is a whole radian: keys before RoPE
    come back, and those of bfloat16 that are turned back and forth are the same to a unit of the last place."""
    kind, changes, *_ = SPIED[name]
    model = tiny(kind, **changes)
    ropes = rope_of(model)
    for n, (before, after) in enumerate(rotations(model, monkeypatch, torch.arange(1, 8)[None], FAR)):
        rope = ropes[n // 2]
        assert isinstance(rope, Rope)
        torch.testing.assert_close(rope.unrotate(after, FAR[0]), before, rtol=1e-4, atol=1e-5)
        held = after.bfloat16()
        back = rope.rotate(rope.unrotate(held.float(), FAR[0]), FAR[0]).bfloat16()
        assert all(ulps(held[:, :, i], back[:, :, i]) <= 1 for i in range(7))


def test_layers_and_models_without_rotation() -> None:
    assert rope_of(tiny("GPT2", n_layer=4)) == {0: None, 1: None, 2: None, 3: None}
    assert rope_of(tiny("OPT", ffn_dim=64, word_embed_proj_dim=64)) == {0: None, 1: None, 2: None, 3: None}
    for name in ("SmolLM3", "Cohere2"):  # every fourth layer has no positions
        ropes = rope_of(tiny(name))
        assert [isinstance(ropes[i], Rope) for i in range(4)] == [True, True, True, False] and ropes[3] is None


def test_layouts_that_cannot_be_undone_are_named() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ropes = rope_of(tiny("Llama", rope_parameters=dynamic))
    assert all(isinstance(r, UnknownRope) and "length" in r.reason for r in ropes.values())
    # HunYuan scales keys per dim after the rotation: what was before is then no rotation of what is stored.
    ropes = rope_of(tiny("HunYuanDenseV1", head_dim=16))
    assert all(isinstance(r, UnknownRope) and "pairs" in r.reason for r in ropes.values())


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_zoo(name: str) -> None:
    """Every architecture that the cache serves is understood, or refused for a reason that is its own."""
    model = zoo.model(name)
    rng = torch.get_rng_state()
    ropes = rope_of(model)
    assert torch.equal(torch.get_rng_state(), rng), "the user's random numbers are not touched"
    reasons = {i: r.reason for i, r in ropes.items() if isinstance(r, UnknownRope)}
    if name == "gemma4":  # its last layers share the slots of earlier ones
        assert sorted(reasons) == [4, 5]
    else:
        assert not reasons


class Codes(nn.Module):
    """A linear layer whose weight is codes of 8 bits and a scale, in a parameter or in no parameter at all."""

    def __init__(self, linear: nn.Linear, kept: bool) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 400
        codes = (linear.weight.detach() / self.scale).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(codes, requires_grad=False) if kept else lambda: codes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32  # as kernels for 8 bits refuse activations of 8 bits
        codes = self.weight if isinstance(self.weight, nn.Parameter) else self.weight()
        return nn.functional.linear(x, codes.to(x.dtype) * self.scale)


@pytest.mark.parametrize("kept", [True, False])
def test_weights_of_8_bits_are_not_what_tokens_are_made_of(kept: bool) -> None:
    """Quantised models: their layers take tokens as the rest of the model does."""
    model, plain = tiny("Llama"), rope_of(tiny("Llama"))
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Codes(getattr(layer.self_attn, name), kept))
    for index, rope in rope_of(model).items():
        assert isinstance(rope, Rope) and isinstance(known := plain[index], Rope), rope
        assert torch.equal(rope.inv_freq, known.inv_freq) and rope.interleaved == known.interleaved
    cache = keepkv.Cache(model, "keepkv2", 8, sinks=2, window=2)
    model(torch.arange(1, 33)[None], **{CACHE: cache})
    assert cache.report().compressed
    with pytest.raises(UnsupportedModel, match="no product of the attention output and a weight that can be read"):
        keepkv.Cache(model, "criticalkv", 8, sinks=2, window=2)


def test_bfloat16_models_and_frequencies_that_follow_the_input() -> None:
    assert all(isinstance(r, Rope) for r in rope_of(tiny("Llama").bfloat16()).values())
    long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 32}  # fmt: skip
    model = tiny("Phi3", rope_parameters=long, original_max_position_embeddings=32)
    rope = rope_of(model)[0]
    if Version(transformers.__version__) < Version("5.23"):  # refused there, with the reason
        assert isinstance(rope, UnknownRope) and "5.23" in rope.reason
        return
    assert isinstance(rope, Rope)
    short = rope.inv_freq.clone()
    with torch.no_grad():
        model(torch.arange(1, 50)[None])
    current = model.model.rotary_emb.inv_freq.clone()
    assert torch.equal(rope.inv_freq, current) and not torch.equal(current, short)
    rope_of(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, current), "looking changes nothing"
