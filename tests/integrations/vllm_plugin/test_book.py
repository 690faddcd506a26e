"""What a worker does with a request that cannot be served; needs no vLLM."""

import pytest
import torch
from paged import BLOCK, Paged
from transformers import LlamaConfig, LlamaForCausalLM

from keepkv.errors import KeepKVError
from keepkv.integrations.vllm.book import Book
from keepkv.integrations.vllm.serve import parts_of


def book() -> Book:
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return Paged(LlamaForCausalLM(config).eval(), blocks=8).book


def in_batch(one: Book, tokens: int) -> int:
    """How many planned rows a batch has, whose only request has so many tokens after the step."""
    tables = torch.arange(8)[None]
    return len(parts_of(one, list(one.sites), ["it"], [0, tokens], [tokens], tables))


def test_a_request_that_only_the_engine_can_refuse_waits_for_its_end_and_does_not_run_on() -> None:
    """Shares for two layers, where the model has three: the scheduler ends the request after its first step."""
    one, wrong = book(), {"keepkv_method": "per-layer", "keepkv_budget": 0.5, "keepkv_shares": [1, 2]}
    one.begin([("it", wrong, 4 * BLOCK)], [], [])
    assert not one.rows and in_batch(one, 4 * BLOCK) == 0 and in_batch(one, 4 * BLOCK + 1) == 0
    with pytest.raises(KeepKVError, match="goes on with it uncompressed"):
        in_batch(one, 4 * BLOCK + 2)
    one.begin([("it", {**wrong, "keepkv_shares": [1, 2, 1]}, 4 * BLOCK)], [], ["it"])
    assert one.rows and in_batch(one, 4 * BLOCK) == 1
