"""An attention mask must go on as it began: what was read under one mask cannot be undone by another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from matrix import SMALL

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.errors import UnsupportedInput

STORES: list[dict[str, Any]] = [
    {}, {"store": "ragged"}, {"store": "static", "store_options": {"capacity": 96}}, {"codec": "int8"}
]  # fmt: skip


def ids(length: int, seed: int = 1, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, zoo.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def feed(cache: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return zoo.model("llama")(tokens, attention_mask=mask, **{CACHE: cache}, **more).logits


@pytest.mark.parametrize("store", STORES, ids=lambda store: str(store))
@pytest.mark.parametrize("method, budget", [("full", None), ("snapkv", 14), ("adakv", 14), ("keepkv", 14)])
def test_rows_that_ended_early_are_hidden_in_the_next_turn(method: str, budget: Any, store: dict[str, Any]) -> None:
    """Two rows; the second ended 3 tokens early, and its padding is hidden. As alone. Without the guard: logits off by
    0.04 (evicting methods), 0.02 (int8)."""
    if method == "adakv" and "static" in store.values():
        return
    options = {**(SMALL if budget else {}), **store}
    model, new = zoo.model("llama"), ids(8, seed=5, rows=2)
    context, decoded = ids(40, rows=2), ids(5, seed=3, rows=2)

    alone = keepkv.Cache(model, method, budget, **options)
    feed(alone, context[1:])
    for n in range(2):
        feed(alone, decoded[1:, n : n + 1])
    expected = feed(alone, new[1:])

    both = keepkv.Cache(model, method, budget, **options)
    mask = torch.ones(2, 40, dtype=torch.long)
    feed(both, context, mask)
    for n in range(5):
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
        feed(both, decoded[:, n : n + 1], mask)
    mask[1, 42:] = 0
    mask = torch.cat((mask, torch.ones(2, 8, dtype=torch.long)), dim=1)
    positions = (mask.cumsum(-1) - 1)[:, -8:]
    out = feed(both, new, mask, position_ids=positions)
    tolerance = 0.05 if "codec" in store else 1e-5
    torch.testing.assert_close(out[1:], expected, atol=tolerance, rtol=tolerance)
    assert both.report().seen == [53, 50]
    assert both.attention_mask(1).shape == (2, 54) and both.attention_mask(1)[1].sum() == 51


def test_hiding_a_token_in_between_is_refused() -> None:
    """Without the guard: the mask is ignored without a word, where it changes a plain cache by 0.168."""
    cache = keepkv.Cache(zoo.model("llama"), "snapkv", 14, **SMALL)
    feed(cache, ids(40))
    expected = feed(cache.copy(), ids(1))
    mask = torch.ones(1, 41, dtype=torch.long)
    mask[:, 5:39] = 0
    with pytest.raises(UnsupportedInput, match=r"the attention mask says something else of columns .*rows \[0\]"):
        feed(cache, ids(1), mask)
    assert torch.equal(feed(cache, ids(1)), expected)


def test_showing_padding_is_refused() -> None:
    cache = keepkv.Cache(zoo.model("llama"), "snapkv", 14, **SMALL)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    feed(cache, ids(40, rows=2), mask)
    for later in (None, torch.ones(2, 41, dtype=torch.long)):  # no mask at all: every column is a token
        with pytest.raises(UnsupportedInput, match=r"rows \[1\]"):
            feed(cache, ids(1, rows=2), later)
    feed(cache, ids(1, rows=2), cache.attention_mask(1))
    assert cache.report().seen == [41, 32]


def test_what_a_compression_has_seen_cannot_be_hidden() -> None:
    cache = keepkv.Cache(zoo.model("llama"), "snapkv", 14, **SMALL)
    feed(cache, ids(40))
    mask = torch.ones(1, 41, dtype=torch.long)
    mask[:, 38:40] = 0
    with pytest.raises(UnsupportedInput, match="hides tokens that a compression has seen"):
        feed(cache, ids(1), mask)


def test_a_mask_that_its_owner_writes_to_is_remembered_as_it_was() -> None:
    cache = keepkv.Cache(zoo.model("llama"), "snapkv", 14, **SMALL)
    mask = torch.ones(1, 40, dtype=torch.bool)
    feed(cache, ids(40), mask)
    mask[:, 5:20] = False
    with pytest.raises(UnsupportedInput, match="says something else"):
        feed(cache, ids(1), torch.cat((mask, mask[:, :1]), dim=1))


@pytest.mark.parametrize("read, columns", [(0, 64), (0, 20), (0, 33), (32, 8), (32, 48), (32, 1)])
def test_a_mask_has_a_column_for_each_that_was_read_and_each_new_one(read: int, columns: int) -> None:
    """Of a wider one the last columns would be taken for those of the new tokens, silently. State stays as it was."""
    cache = keepkv.Cache(zoo.model("llama"), "full")
    if read:
        feed(cache, ids(read), torch.ones(1, read, dtype=torch.long))
    new = ids(8 if read else 32, seed=2)
    with pytest.raises(
        UnsupportedInput, match=f"mask of {columns} columns for {new.shape[1]} new tokens behind {read}"
    ):
        feed(cache, new, torch.ones(1, columns, dtype=torch.long))
    again = keepkv.Cache(zoo.model("llama"), "full")
    if read:
        feed(again, ids(read))
    assert torch.equal(feed(cache, new, torch.ones(1, read + new.shape[1], dtype=torch.long)), feed(again, new))
