"""The plan's arithmetic against what a cache really holds, and what its blocks promise; needs no vLLM."""

import random
from functools import cache
from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.integrations.vllm.plan import Plan, plan_of
from keepkv.integrations.vllm.wish import wish_of


def plan(prompt: int, *, block: int = 16, layers: int = 1, longest: int = 400, **keys: Any) -> Plan:
    made = wish_of({f"keepkv_{name}": x for name, x in keys.items()}, None)
    assert made is not None
    return Plan(made, prompt, block, layers, longest)


budgets = st.one_of(st.floats(0.02, 0.95), st.integers(12, 120))
plans = st.builds(
    plan,
    prompt=st.integers(1, 300),
    block=st.sampled_from([8, 16, 32]),
    layers=st.sampled_from([1, 3]),
    method=st.sampled_from(["snapkv", "adakv", "keepkv2", "pyramidkv"]),
    budget=budgets,
    every=st.one_of(st.none(), st.integers(1, 40)),
    window=st.integers(1, 8),
)


@settings(max_examples=60, deadline=None)
@given(plans)
def test_blocks_given_back_are_never_needed_again(one: Plan) -> None:
    before = 0
    for seen in range(0, 400):
        first = one.first_block(seen)
        assert first >= before, "a block that was given back is read again"
        before = first
        event = one.last_event(seen)
        if not event:
            assert first == 0
        elif one.packed:  # whatever the counts of N heads, their pages fit
            assert first == 0 or event // one.block - first >= ceil(one.held(event) / one.block) + 1
        else:
            assert first * one.block <= event - one.held(event)


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(0, 400))
def test_events_follow_the_prompt_and_each_other(one: Plan, seen: int) -> None:
    following = one.next_event(seen)
    assert following is None or following > seen
    assert one.last_event(seen) <= seen
    if following is not None:
        assert one.last_event(following) == following
        assert following == one.prompt or (one.every is not None and (following - one.prompt) % one.every == 0)


@settings(max_examples=60, deadline=None)
@given(plans)
def test_what_may_be_shared_is_never_written(one: Plan) -> None:
    assert one.readable <= one.untouched
    loss = one.first_loss
    if loss is None:
        assert all(one.held(event) == event for event in range(one.prompt, 401, one.every or 401))
    else:
        assert one.held(loss) < loss
        # Kept slots lie at or behind this block after this event and every later one.
        assert one.untouched == one.first_block(loss) * one.block and one.readable % one.block == 0


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 499), st.sampled_from([8, 16, 32]))
def test_fill_leaves_no_hole(prompt: int, slots: int, block: int) -> None:
    one = plan(prompt, block=block, method="knorm", budget=slots, fill=True, sinks=1)
    held = one.held(prompt)
    assert held == prompt or (prompt - held) % block == 0
    assert min(prompt, slots) <= held < slots + block


def test_an_ordinary_request_has_no_plan() -> None:
    made = wish_of({"keepkv_method": "knorm", "keepkv_budget": 64}, None)
    assert plan_of(None, 100, 16, 1, 400) is None
    assert plan_of(made, 40, 16, 1, 64) is None, "it never grows beyond its budget"
    assert plan_of(made, 40, 16, 1, 400) is None, "it is compressed once, and then nothing is to be dropped"
    assert plan_of(made, 65, 16, 1, 400) is not None


# --- against a cache -------------------------------------------------------------------------------------------------

LAYERS, HEADS = 3, 2


@cache
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=HEADS, head_dim=8, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def held_by_a_cache(one: Plan, decoded: int) -> list[list[list[int]]]:
    """Slots of each layer and head at the prompt's end and before each of ``decoded`` tokens."""
    made, found = model(), []
    wish = one.wish
    cache = keepkv.Cache(made, wish.method, wish.budget, seed=wish.settings.seed)
    ids = torch.randint(0, 64, (1, one.prompt), generator=torch.Generator().manual_seed(one.prompt))
    with torch.inference_mode():
        made(ids, **{CACHE: cache})
        for _ in range(decoded):
            made(ids[:, :1], **{CACHE: cache})  # a compression that is due comes first
            kept = cache.report().kept
            found.append([[n - 1 for n in kept[layer][0]] for layer in sorted(kept)])
    return found


@pytest.mark.parametrize("seed", range(12))
def test_as_many_slots_as_a_cache_holds(seed: int) -> None:
    rng = random.Random(seed)
    method = rng.choice(["snapkv", "adakv", "keepkv2", "pyramidkv", "knorm"])
    options = {"window": rng.randint(1, 6)} if method != "knorm" else {}
    budget, every = rng.choice([rng.uniform(0.1, 0.9), rng.randint(12, 70)]), rng.choice([None, 1, 3, 7])
    prompt, sinks = rng.randint(20, 80), rng.randint(0, 3)
    one = plan(prompt, layers=LAYERS, method=method, budget=budget, every=every, sinks=sinks, **options)
    for decoded, kept in enumerate(held_by_a_cache(one, 16)):
        seen = one.prompt + decoded
        held = one.held(one.last_event(seen)) + seen - one.last_event(seen)
        counts = [n for heads in kept for n in heads]
        assert held - 1 < sum(counts) / len(counts) <= held
        if not one.packed:
            assert set(counts) == {held}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 100_000), st.floats(0.001, 0.999), st.sampled_from(["snapkv", "keepkv2"]))
def test_a_share_of_a_long_prompt(prompt: int, share: float, method: str) -> None:
    one = plan(prompt, method=method, budget=share, longest=200_000)
    pinned = one.wish.method.sinks + one.wish.method.window
    assert one.held(prompt) == min(prompt, max(pinned, int(prompt * share + 1e-9)))
