"""What is compressed of a prompt that is read again is what is compressed of one that is read."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import keepkv
from benchmarks.compression.replay import Replay
from keepkv.engine.versions import CACHE


def test_a_replayed_prompt_keeps_the_same_slots() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(64, (1, 80))
    replay = Replay(model)

    def kept() -> tuple[torch.Tensor, torch.Tensor]:
        cache = keepkv.Cache(model, "snapkv", 40, when=keepkv.When("deferred"), window=8)
        model(ids, **{CACHE: cache}, logits_to_keep=1)
        cache.compress()
        return cache.kept_positions(0), cache.layers[0].store.view().keys

    with torch.inference_mode():
        usual = kept()
        for _ in range(2):
            with replay.runs():
                again = kept()
            assert all(torch.equal(one, other) for one, other in zip(usual, again, strict=True))
        with replay.runs():
            wrong = model.model.layers[0].self_attn.q_proj(torch.zeros(1, 1, 32))
            with replay.live():
                right = model.model.layers[0].self_attn.q_proj(torch.zeros(1, 1, 32))
        assert wrong.shape[1] == 80 and right.shape[1] == 1
        after = kept()
    assert torch.equal(usual[0], after[0]) and len(replay.known) == 7
