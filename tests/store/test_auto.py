"""``codec="auto"``: which codec a budget asks for, and one byte budget over slots and bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import keepkv
from keepkv.core.budget import Budget
from keepkv.engine.versions import CACHE
from keepkv.errors import KeepKVError
from keepkv.store import settled

FOUR, KEYS, EIGHT, NONE = ("hadamard", {}), ("hadamard", {"key_bits": 8}), ("hadamard", {"bits": 8}), ("none", {})
TOKENS, WIDTH = 1024, 64


@pytest.mark.parametrize(
    ("budget", "found"),
    [
        ("2%bytes", FOUR), ("45%bytes", FOUR), ("50%bytes", KEYS), ("61%bytes", EIGHT), ("100%bytes", NONE),
        (0.1, FOUR), (0.5, FOUR), (0.6, EIGHT), (1.0, NONE), (512, FOUR), ("64MiB", FOUR),
    ],
)  # fmt: skip
def test_what_a_budget_asks_for(budget: Any, found: tuple[str, dict[str, Any]]) -> None:
    assert settled("auto", {}, Budget.of(budget)) == found
    assert settled("int8", {"x": 1}, Budget.of(budget)) == ("int8", {"x": 1})


@pytest.fixture(scope="module")
def model() -> Any:
    """Heads as wide as those of real models."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=4 * WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def read(model: Any, method: str, budget: Any, codec: str, **more: Any) -> keepkv.Cache:
    cache = keepkv.Cache(model, method, budget, codec=codec, **more)
    ids = torch.randint(64, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids, **{CACHE: cache})
    return cache


PLAIN = 2 * 2 * 2 * WIDTH * 2 * TOKENS  # bytes: layers, heads, key and value, bfloat16


@pytest.mark.parametrize("budget", ["5%bytes", "10%bytes", "25%bytes", f"{PLAIN // 10}B", f"{PLAIN // 4}B"])
@pytest.mark.parametrize("method", ["keepkv2", "auto", "snapkv"])
def test_one_byte_budget_over_slots_and_bits(model: Any, method: str, budget: str) -> None:
    cache, asked = read(model, method, budget, "auto"), Budget.of(budget)
    cache.compressing = asked.bytes is not None  # bytes hold what the score remembers too, a share of them slots alone
    wanted = asked.bytes or round((asked.share_of_bytes or 0) * PLAIN)
    assert 0.97 * wanted <= cache.report().bytes <= 1.03 * wanted
    exact = read(model, method, budget, "none").report()
    kept = [sum(n for layer in x.kept.values() for row in layer for n in row) for x in (cache.report(), exact)]
    assert kept[0] > 2.5 * kept[1]


@pytest.mark.parametrize(("budget", "least"), [("31%bytes", 0.29), ("46%bytes", 0.41), ("61%bytes", 0.54)])
def test_as_many_bits_as_every_token_fits_into(model: Any, budget: str, least: float) -> None:
    cache = read(model, "auto", budget, "auto")
    cache.compressing = False
    assert least <= cache.report().ratio <= (Budget.of(budget).share_of_bytes or 0) and not cache.report().dropped


def test_the_exact_window_is_written_in_codes_where_bytes_are_scarce(model: Any) -> None:
    """Every token fits a share of the bytes in codes, and not with the newest 32 of them exact."""
    receipt = read(model, "knorm", "29.8%bytes", "int4").report()
    assert receipt.ratio <= 0.298 and receipt.dropped == 0


def test_auto_is_settled_when_the_cache_is_made(model: Any) -> None:
    cache = keepkv.Cache(model, "auto", "10%bytes", codec="auto")
    assert (cache.codec, cache.codec_options) == FOUR and cache.report().codec == "hadamard"
    assert keepkv.Cache(model, "full", codec="auto").codec == "none"
    assert (
        keepkv.Cache(model, "snapkv", 64, codec="auto", store="static").codec == "none"
    )  # which holds slots as they are
    with pytest.raises(KeepKVError, match="name the codec too"):
        keepkv.Cache(model, "auto", "10%bytes", codec="auto", codec_options={"bits": 2})


@pytest.mark.parametrize("codec", ["kivi", "kvquant"])
@pytest.mark.parametrize("method", ["snapkv", "auto"])
@pytest.mark.parametrize("budget", ["4%bytes", "10%bytes", "25%bytes", f"{PLAIN // 10}B"])
def test_groups_that_stay_are_paid_for(model: Any, codec: str, method: str, budget: str) -> None:
    """The scales of 32 tokens stay while one of them does: before, "10%bytes" held 12 %."""
    cache, asked = read(model, method, budget, codec), Budget.of(budget)
    cache.compressing = asked.bytes is not None
    wanted = asked.bytes or round((asked.share_of_bytes or 0) * PLAIN)
    assert 0.3 * wanted <= cache.report().bytes <= 1.03 * wanted  # slots side by side share a group: less is held
