"""A generation runs on the cache that it was given, or raises."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers as t
import zoo
from packaging.version import Version
from running import batch, generate, row

import keepkv
from keepkv.engine.versions import CACHE, cache_of
from keepkv.errors import CacheStateError, UnsupportedInput

LONG = 64  # original_max_position_embeddings
ROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    "original_max_position_embeddings": LONG,
}  # fmt: skip
# transformers 5.18 drops its cache and reads one token instead of all: its own answer is off by 2.4.
REREADS = Version(t.__version__) >= Version("5.23")
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}


def longrope(kind: str = "Phi3") -> Any:
    """A model that drops its cache where its input outgrows ``LONG`` tokens, its weights so that answers differ."""
    torch.manual_seed(0)
    more = {"max_position_embeddings": 512, "original_max_position_embeddings": LONG, "rope_parameters": dict(ROPE)}
    if kind == "Phimoe":
        more |= MOE
        more["rope_parameters"] |= {"short_mscale": 1.0, "long_mscale": 1.0}
    model = getattr(t, f"{kind}ForCausalLM")(getattr(t, f"{kind}Config")(**{**zoo._BASE, **more})).eval()
    for x in model.parameters():
        x.data.mul_(4 if x.dim() == 2 else 1)
    return model


@pytest.mark.parametrize("kind", ["Phi3", "Phimoe"])
@pytest.mark.parametrize("tokens", [100, 60])
def test_longrope_is_compressed(kind: str, tokens: int) -> None:
    """Before the guard ours saw 0 of 107 tokens and a plain cache did the work, longer than the budget, unsaid.

    100 tokens are longer than the short context from the start, 60 outgrow it while they are continued.
    """
    model, inputs = longrope(kind), batch((tokens,))
    if tokens < LONG and not REREADS:
        with pytest.raises(CacheStateError, match="1 token"):
            generate(model, inputs, keepkv.Cache(model, "full"), new=8)
        return
    plain, full = generate(model, inputs, None, new=8), keepkv.Cache(model, "full")
    out = generate(model, inputs, full, new=8)
    assert torch.equal(out.sequences, plain.sequences)
    assert torch.allclose(out.scores_, plain.scores_, atol=1e-4)
    small = keepkv.Cache(model, "knorm", 16)
    out = generate(model, inputs, small, new=8)
    assert cache_of(out) is small
    assert small.report().seen == [tokens + 7]
    kept = small.report().kept
    assert max(n for rows in kept.values() for n in rows[0]) <= 16 + 8
    assert not torch.allclose(out.scores_, plain.scores_, atol=1e-3)


@pytest.mark.skipif(not REREADS, reason="this transformers does not read the text again")
def test_longrope_in_several_turns_is_compressed_again() -> None:
    """A second turn that outgrows the short context is as if the whole had been read at once."""
    model, inputs = longrope(), batch((100,))
    cache = keepkv.Cache(model, "snapkv", 20, window=4, sinks=2)
    first = {name: x[:, :50] for name, x in inputs.items()}
    generate(model, first, cache, new=1)
    assert cache.report().seen == [50]
    out = generate(model, inputs, cache)
    assert cache.report().seen == [105] and cache.report().compressed
    once = generate(model, inputs, keepkv.Cache(model, "snapkv", 20, window=4, sinks=2))
    assert torch.equal(out.scores_, once.scores_)


@pytest.mark.skipif(not REREADS, reason="this transformers does not read the text again")
def test_beams_and_drafts_outgrow_the_short_context_too() -> None:
    model, inputs = longrope(), batch((60,))
    for options in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
        plain = generate(model, inputs, None, new=12, **options)
        out = generate(model, inputs, keepkv.Cache(model, "full"), new=12, **options)
        assert torch.equal(out.sequences, plain.sequences)
        small = keepkv.Cache(model, "knorm", 16, when=keepkv.When(every=4))
        generate(model, inputs, small, new=12, **options)
        assert all(n >= 70 for n in small.report().seen) and small.report().compressed


def test_a_cache_that_cannot_be_read_again_is_not_dropped_silently() -> None:
    model, inputs = longrope(), batch((100,))
    cache = keepkv.Cache(model, "knorm", 16)
    generate(model, {name: x[:, :50] for name, x in inputs.items()}, cache, new=1)
    cache.compressing = False
    with pytest.raises(CacheStateError, match="longrope"):
        generate(model, inputs, cache)
    assert cache.report().seen == [50]


def test_a_model_that_goes_on_with_another_cache_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the model: here one whose forward takes a cache of its own."""
    model = zoo.ZOO["llama"]().eval()
    cache = keepkv.Cache(model, "knorm", 16)
    forward = type(model).forward

    def careless(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **{**kwargs, CACHE: t.DynamicCache(config=self.config)})

    monkeypatch.setattr(type(model), "forward", careless)
    with pytest.raises(CacheStateError, match="did not use it"):
        generate(model, row(batch(), 0), cache)


def test_a_cache_with_use_cache_off_is_refused() -> None:
    """transformers would feed it the whole text in every step: 250 tokens seen of 65."""
    model = zoo.model("llama")
    cache = keepkv.Cache(model, "knorm", 16)
    with pytest.raises(UnsupportedInput, match="use_cache=False"):
        generate(model, row(batch(), 0), cache, use_cache=False)
    assert cache.report().seen == []


def test_copies_and_pickles_of_a_switched_model_stand_alone() -> None:
    """Their ``generate`` is their own, not that of the first model."""
    model = zoo.ZOO["llama"]().eval()
    held = keepkv.Cache(model, "knorm", 16)
    inputs = row(batch(), 0)
    expected = generate(model, inputs, None).sequences
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.generate.__self__ is twin and held.seen.tolist() == []
        twin.set_attn_implementation("sdpa")
        model.model.embed_tokens.weight.data.zero_()
        assert torch.equal(generate(twin, inputs, None).sequences, expected)
        assert keepkv.Cache(twin, "knorm", 16).report().seen == []
        cache = keepkv.Cache(twin, "knorm", 16)
        generate(twin, inputs, cache)
        assert cache.report().compressed
        model.load_state_dict(twin.state_dict())
