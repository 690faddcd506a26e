"""Rotation as data: undone, averaged in closed form, and read off real model classes."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers
import transformers as t
import zoo
from packaging.version import Version
from torch import Tensor, nn

from keepkv.core.rope import Rope
from keepkv.engine.rope_probe import UnknownRope, rope_of

torch.set_num_threads(1)
F64 = torch.float64
LAYOUTS = [
    pytest.param(8, False, 1.0, id="half-split"),
    pytest.param(8, True, 1.0, id="interleaved"),
    pytest.param(4, False, 1.0, id="partial"),
    pytest.param(4, True, 1.4, id="partial-interleaved-scaled"),
    pytest.param(8, False, 1.3, id="scaled"),
]
layouts = pytest.mark.parametrize(("dims", "interleaved", "scaling"), LAYOUTS)


def make(dims: int, interleaved: bool, scaling: float) -> Rope:
    """Frequencies from one radian per position down to none at all."""
    inv_freq = torch.cat((torch.logspace(0, -3, dims // 2 - 1), torch.zeros(1)))
    return Rope(inv_freq, scaling, interleaved)


def matrix(rope: Rope, position: int, dim: int = 8) -> Tensor:
    """R_p (D,D) float64, written out."""
    out = torch.eye(dim, dtype=F64)
    half = rope.dims // 2
    for i, angle in enumerate((rope.inv_freq.double() * position).tolist()):
        a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + half)
        cos, sin = torch.tensor(angle, dtype=F64).cos(), torch.tensor(angle, dtype=F64).sin()
        out[a, a], out[a, b], out[b, a], out[b, b] = cos, -sin, sin, cos
        out[a] *= rope.scaling
        out[b] *= rope.scaling
    return out


@layouts
def test_rotation_and_its_inverse(dims: int, interleaved: bool, scaling: float) -> None:
    rope = make(dims, interleaved, scaling)
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 500, 5000]])
    turned = rope.rotate(x, positions[:, None])
    for b in range(2):
        for n in range(5):
            wanted = x[b, :, n].double() @ matrix(rope, int(positions[b, n])).T
            torch.testing.assert_close(turned[b, :, n].double(), wanted, rtol=0, atol=2e-3 if n > 2 and b else 1e-5)
    torch.testing.assert_close(rope.unrotate(turned, positions[:, None]), x, rtol=0, atol=1e-6)
    assert rope.rotate(x.bfloat16(), positions[:, None]).dtype == torch.bfloat16


@layouts
@pytest.mark.parametrize("count", [1, 2, 7, 512])
def test_average_in_closed_form(dims: int, interleaved: bool, scaling: float, count: int) -> None:
    """Mean rotation and mean second moment equal the mean over positions, to 1e-12, from far positions too."""
    rope = make(dims, interleaved, scaling)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 8, dtype=F64, generator=rng)
    factor = torch.randn(2, 3, 8, 8, dtype=F64, generator=rng)
    moment = factor @ factor.transpose(-1, -2)
    start = torch.tensor([0, 100_003])
    mean, back = rope.average(x, start, count), rope.average(x, start, count, transpose=True)
    second = rope.average_moment(moment, start, count)
    for b in range(2):
        turns = torch.stack([matrix(rope, int(start[b]) + j) for j in range(count)])
        torch.testing.assert_close(mean[b], x[b] @ turns.mean(0).T, rtol=0, atol=1e-10 if b else 1e-12)
        torch.testing.assert_close(back[b], x[b] @ turns.mean(0), rtol=0, atol=1e-10 if b else 1e-12)
        wanted = torch.stack([turns @ m @ turns.transpose(-1, -2) for m in moment[b]]).mean(1)
        torch.testing.assert_close(second[b], wanted, rtol=0, atol=1e-9 if b else 1e-11)


def test_average_keeps_slow_pairs_and_damps_fast_ones() -> None:
    rope = Rope(5e5 ** (-torch.arange(64) / 64))
    x = torch.ones(1, 1, 128)
    size = rope.average(x, torch.tensor([1000]), 512)[0, 0].view(2, 64).norm(dim=0) / 2**0.5
    assert (size < 0.05).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert (size > 0.95).float().mean().item() == pytest.approx(0.53, abs=0.05)


# --- real model classes ------------------------------------------------------------------------------------------

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
FULL = {"layer_types": ["full_attention"] * 4}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 16}
ROPES = {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
# name: class, configuration, rotated dims, interleaved
SPIED = {
    "llama": ("Llama", {}, 16, False),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}, 16, False),
    "qwen2": ("Qwen2", {}, 16, False),
    "qwen3": ("Qwen3", {"head_dim": 16}, 16, False),
    "phi3": ("Phi3", {}, 16, False),
    "gemma3": ("Gemma3", {**MIXED, "rope_parameters": ROPES}, 16, False),
    "gpt-neox": ("GPTNeoX", {}, 4, False),
    "cohere": ("Cohere", {}, 16, True),
    "glm": ("Glm", {"head_dim": 16}, 8, True),
    "gpt-oss": ("GptOss", {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, **FULL}, 16, False),
}


def tiny(name: str, **changes: Any) -> Any:
    config = getattr(t, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**{**BASE, **changes})
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # a norm of ones would hide whether it comes before or after the rotation
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def rotations(model: nn.Module, monkeypatch: pytest.MonkeyPatch, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Queries before and after the model's own ``apply_rotary_pos_emb``, layer by layer."""
    module = sys.modules[type(model).__module__]
    real, seen = module.apply_rotary_pos_emb, []

    def spy(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = real(q, k, *args, **kwargs)
        seen.extend([(q, out[0]), (k, out[1])])
        return out

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "apply_rotary_pos_emb", spy)
        model(ids)
    return seen


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


@pytest.mark.filterwarnings("ignore:.*three dimensions")
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


def test_positions_of_images_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="exact for text, approximate where the prompt holds images"):
        assert all(isinstance(r, Rope) for r in rope_of(zoo.model("qwen2-vl")).values())


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
