"""A prompt is a prompt, even where its last chunk, or all of it, is one token."""

from __future__ import annotations

from typing import Any

import matrix
import pytest
import torch
import zoo
from matrix import SMALL
from running import batch, row
from test_rollback import NAMES, OPTIONS, feed, ids, kept

import keepkv
from keepkv.engine.versions import CACHE


def read(name: str, chunk: int | None) -> tuple[Any, torch.Tensor]:
    cache = matrix.made(zoo.model("llama"), name, 20, when=keepkv.When("deferred"), **OPTIONS[name])
    more = {} if chunk is None else {"prefill_chunk_size": chunk}
    out = zoo.model("llama").generate(
        **batch((49,)), **{CACHE: cache}, max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **more,
    )  # fmt: skip
    return kept(cache), torch.stack(out.logits)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "full"])
def test_a_last_chunk_of_one_token_is_no_decoded_token(name: str) -> None:
    """49 tokens in chunks of 16 and of 48. Without the guard: 5 positions of the first layer differ (tova)."""
    slots, logits = read(name, None)
    for chunk in (16, 48):
        chunked_slots, chunked_logits = read(name, chunk)
        assert chunked_slots == slots, chunk
        torch.testing.assert_close(chunked_logits, logits, atol=1e-4, rtol=1e-4)


def test_a_prompt_of_one_token_beside_a_longer_one_is_counted_as_alone() -> None:
    """Without the guard: the short row is compressed a token earlier alone than in the batch."""
    model, inputs = zoo.model("llama"), batch((9, 1))
    when = keepkv.When("deferred", every=4)
    both, alone = (keepkv.Cache(model, "keydiff", 4, when=when, window=1, sinks=1) for _ in range(2))
    counts: list[list[int]] = [[], []]
    for cache, given, at, found in ((both, inputs, 1, counts[0]), (alone, row(inputs, 1), 0, counts[1])):
        for new in range(1, 9):
            twin = cache.copy()
            model.generate(**given, **{CACHE: twin}, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            found.append(int(twin.compressible[0].store.lengths[at].max()))
    assert counts[0] == counts[1]


def test_a_prompt_fed_by_hand_can_say_that_it_is_one() -> None:
    cache, once = (
        keepkv.Cache(zoo.model("llama"), "snapkv", 14, when=keepkv.When("deferred"), **SMALL) for _ in range(2)
    )
    feed(once, ids(40))
    with cache.reading():
        for part in ids(40).split(13, dim=1):  # the last is one token
            feed(cache, part)
    for one in (cache, once):
        feed(one, ids(1, seed=2))
    assert kept(cache) == kept(once)
