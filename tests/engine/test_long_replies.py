"""Long replies: how many slots are held at any step, prompts that stay, rows that end early, and where chance comes
from."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import matrix
import pytest
import torch
import zoo
from running import batch, generate, row
from torch import Tensor

import keepkv
from keepkv import Span, SpanPolicy
from keepkv.engine.versions import CACHE
from keepkv.errors import BudgetError, KeepKVError
from keepkv.methods import make_method
from keepkv.methods.apply import compress as compress_views

DECODING = [
    "g-kv", "r-kv", "snapkv-decode", "morphkv", "rpc", "raas", "lazy-eviction", "vase", "triattention",
    "random-attention", "h2o", "tova", "streaming-llm",
]  # fmt: skip
QUICK = ("g-kv", "raas", "random-attention")
EACH = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in DECODING]
DRAWS = ["random-attention", "vase", "random", "cam"]
LENGTHS, BUDGET, EVERY = (25, 14, 3), 32, 3


def small(name: str, **options: Any) -> dict[str, Any]:
    """Options of a method with little that is always kept, and those of ``options`` that it has."""
    known = next(x for x in keepkv.methods() if x.name == name).options
    given = {"window": 4, "sinks": 2, "when": keepkv.When(every=EVERY), **options}
    return {k: x for k, x in given.items() if k in known or k == "seed"}


def made(name: str, budget: Any = BUDGET, seed: int = 0, **options: Any) -> keepkv.Cache:
    return matrix.made(zoo.model("llama"), name, budget, seed=seed, **small(name, **options))


def sampled(inputs: dict[str, Tensor], cache: Any, new: int = 60, seed: int = 1, **options: Any) -> Tensor:
    """Token ids of a sampled reply."""
    torch.manual_seed(seed)
    out: Tensor = zoo.model("llama").generate(
        **inputs, **{CACHE: cache}, max_new_tokens=new, do_sample=True, pad_token_id=0, **options
    )
    return out


def watch(cache: keepkv.Cache) -> list[Tensor]:
    """Filled, while ``cache`` is used, with the slots (B,H) that a layer holds when it attends."""
    held: list[Tensor] = []

    def watched(layer: Any, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if query.shape[2] == 1:
                held.append(layer.store.lengths.clone())
            return attend(module, query, *args, **kwargs)

        return run

    for layer in cache.compressible:
        layer.attend = watched(layer, layer.attend)  # type: ignore[method-assign]
    return held


# --- how much is held --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", EACH)
def test_no_step_holds_more_than_the_budget_and_the_interval(name: str, prompt: bool) -> None:
    """Of a long sampled reply to prompts of different lengths, two of which are shorter than the budget."""
    cache = made(name, prompt=prompt)
    held = watch(cache)
    end = {"eos_token_id": 7}  # rows end at different steps; what follows is padding that transformers feeds
    sampled(batch(LENGTHS), cache, 60, **end)
    most = torch.stack([x.amax(-1) for x in held]).amax(0)
    assert (most <= BUDGET + EVERY).all()
    assert int(most.max()) == BUDGET + EVERY and cache.report().compressed
    assert all(int(x) == BUDGET for x in min_after_first(held, len(cache.compressible)))


def min_after_first(held: list[Tensor], layers: int) -> list[Tensor]:
    """Slots that the longest row holds after each of its compressions, in the first layer and head."""
    counts = [x[0, 0] for x in held[::layers]]
    return [now - 1 for before, now in pairwise(counts) if now <= before]


@pytest.mark.parametrize("name", ["rpc", "random-attention", "g-kv"])
def test_a_share_is_one_of_what_follows_a_prompt_that_stays(name: str) -> None:
    """RPC's growth: prompt + a quarter of the reply, and at most the interval more."""
    cache = made(name, 0.25, prompt=True, sinks=0)
    held = watch(cache)
    sampled(batch(LENGTHS), cache, 60)
    steps = [torch.stack(held[i : i + 3]) for i in range(0, len(held), 3)]  # of 3 layers
    for n, step in enumerate(steps, start=1):  # n tokens of the reply are held or dropped
        allowed = torch.tensor(LENGTHS) + max(n // 4, min(n, 4)) + EVERY
        assert (step <= allowed[:, None]).all()
    assert (steps[-1].amax((0, 2)) < torch.tensor(LENGTHS) + 59 // 2).all() and cache.report().compressed


@pytest.mark.parametrize(("length", "every"), [(20, 8), (32, 8), (40, 8), (31, 5), (40, 5), (32, 1)])
def test_g_kv_compresses_at_every_multiple_of_the_interval(length: int, every: int) -> None:
    """After the prompt where it is longer than the budget, and then after tokens every, 2·every, …: the token there
    still sees everything."""
    cache = made("g-kv", 32, when=keepkv.When(every=every))
    held = watch(cache)
    generate(zoo.model("llama"), row(batch((length,)), 0), cache, new=40)
    slots = min(length, 32)
    for step, counts in enumerate(held[::3], start=1):
        slots += 1
        assert (counts == slots).all(), f"step {step}"
        slots = min(slots, 32) if step % every == 0 else slots


# --- prompts that stay -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EACH)
def test_every_token_of_the_prompt_stays(name: str) -> None:
    cache = made(name, prompt=True)
    generate(zoo.model("llama"), batch(LENGTHS), cache, new=40)
    assert cache.report().compressions > 5 and cache.report().keep_rate["prompt"] == 1.0
    for layer in range(3):
        for kept, length in zip(cache.kept_positions(layer), LENGTHS, strict=True):
            assert all(set(range(length)) <= set(head.tolist()) for head in kept)
            assert all((head[head >= 0].diff() > 0).all() for head in kept)


def test_a_prompt_that_stays_is_a_span_for_any_method() -> None:
    """With spans of one's own inside, in chunks, through copies, files and other rows; a later turn is no prompt."""
    model, policy = zoo.model("llama"), SpanPolicy([Span(1, 3, "protect"), Span(0, 2, "fair")], prompt=True)
    cache = keepkv.Cache(model, "keydiff", BUDGET, spans=policy, when=keepkv.When(every=EVERY))
    generate(model, batch(LENGTHS), cache, new=20, prefill_chunk_size=7)
    assert cache.report().compressed
    twin = cache.copy()
    twin.reorder_cache(torch.tensor([2, 0, 1]))
    for one, lengths in ((cache, LENGTHS), (twin, (3, 25, 14)), (cache.copy().split([1]), (14,))):
        for kept, length in zip(one.kept_positions(0), lengths, strict=True):
            assert all(set(range(length)) <= set(head.tolist()) for head in kept)
    alone = made("random-attention", prompt=True)
    first = generate(model, row(batch(LENGTHS), 1), alone, new=6)
    ids = torch.cat((first.sequences, torch.randint(3, zoo.VOCAB, (1, 60))), 1)
    generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, alone)
    kept = alone.kept_positions(0)[0]
    assert all(set(range(14)) <= set(head.tolist()) and len(head) <= BUDGET + EVERY + 5 for head in kept)


@pytest.mark.parametrize("budget", [14, 28])
def test_a_budget_that_cannot_hold_the_prompt_is_refused_while_it_is_read(budget: int) -> None:
    """Also one that holds the prompt and not the window beside it, which a long reply would find out."""
    cache = made("g-kv", budget, prompt=True)
    with pytest.raises(BudgetError, match=r"25 tokens of its prompt .* at least 29 slots per head, or prompt=False"):
        generate(zoo.model("llama"), batch(LENGTHS), cache, new=2)
    assert not cache.report().compressed
    fits = made("g-kv", 29, prompt=True)
    generate(zoo.model("llama"), batch(LENGTHS), fits, new=30)
    for policy in ("grow", "trim"):
        other = keepkv.Cache(
            zoo.model("llama"), "g-kv", 14, spans=SpanPolicy([], on_overflow=policy), **small("g-kv", prompt=True)
        )
        with pytest.warns(UserWarning) if policy == "trim" else pytest.MonkeyPatch.context():
            generate(zoo.model("llama"), batch(LENGTHS), other, new=8)
        assert (int(other.compressible[0].store.lengths.max()) > 25) == (policy == "grow")


def test_views_alone_do_not_say_where_a_prompt_ends() -> None:
    from score_views import row as view_of

    with pytest.raises(KeepKVError, match="prompt=False"):
        compress_views(make_method("random-attention", {}), [view_of(1)], [torch.tensor([4])])
    whole = keepkv.Cache(zoo.model("llama"), "streaming-llm", BUDGET)
    generate(zoo.model("llama"), batch(LENGTHS), whole, new=2)
    with pytest.raises(KeepKVError, match="keeps the prompt"):
        whole.copy(method=make_method("streaming-llm", {"prompt": True}))


def test_a_saved_prompt_stays(tmp_path: Any) -> None:
    model, cache = zoo.model("llama"), made("random-attention", prompt=True)
    generate(model, batch(LENGTHS), cache, new=10)
    cache.save(tmp_path / "c")
    again = keepkv.Cache.load(tmp_path / "c", model)
    feeds = torch.full((3, 1), 5)
    for _ in range(12):
        with torch.no_grad():
            outs = [
                model(input_ids=feeds, attention_mask=x.attention_mask(1), **{CACHE: x}).logits for x in (cache, again)
            ]
        assert torch.allclose(*outs, atol=1e-5)
    assert all(set(range(25)) <= set(head.tolist()) for head in again.kept_positions(0)[0])


# --- rows, and chance --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EACH)
def test_a_row_that_has_ended_changes_no_other(name: str) -> None:
    """It is fed padding to the end, or taken out of the batch: the others go on as they do alone."""
    model, inputs = zoo.model("llama"), batch(LENGTHS)
    alone = generate(model, row(inputs, 0), made(name), new=40).scores_[0]
    stop = int(generate(model, row(inputs, 1), made(name), new=12).sequences[0, -1])
    together = made(name)
    out = generate_until(inputs, together, 40, stop)
    assert torch.allclose(out[: len(alone)], alone, atol=1e-5)
    cache = made(name)
    first = generate(model, inputs, cache, new=10)
    left = cache.split([0])
    feed, logits = first.sequences[:1, -1:], []
    with torch.no_grad():
        for _ in range(30):
            step = model(input_ids=feed, attention_mask=left.attention_mask(1), **{CACHE: left}).logits[0, -1:]
            logits.append(step)
            feed = step.argmax(-1, keepdim=True)
    assert torch.allclose(torch.cat(logits), alone[10:], atol=1e-5)


def generate_until(inputs: dict[str, Tensor], cache: keepkv.Cache, new: int, stop: int) -> Tensor:
    """Logits (new, vocabulary) of row 0, where row 1 has ended at ``stop`` and is fed padding from then on."""
    model, ids, mask, ended, logits = zoo.model("llama"), inputs["input_ids"], inputs["attention_mask"], False, []
    with torch.no_grad():
        for _ in range(new):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = model(input_ids=ids, attention_mask=mask, position_ids=positions, **{CACHE: cache}).logits[:, -1]
            logits.append(out[0])
            ids = out.argmax(-1, keepdim=True)
            ended = ended or int(ids[1]) == stop
            ids[1] = 0 if ended else ids[1]
            mask = torch.cat((mask, torch.ones_like(ids)), 1)
    assert ended
    return torch.stack(logits)


@pytest.mark.parametrize("order", [[2, 0, 1], pytest.param([1, 2, 0], marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_for_a_row_knows_no_other(name: str, order: list[int]) -> None:
    """Same seed, same slots, alone or in a batch in any order; another seed, others; every compression draws anew."""
    model, inputs, ends = zoo.model("llama"), batch(LENGTHS), {"window": 0} if name == "cam" else {}
    mixed = {key: x[order] for key, x in inputs.items()}
    cache = made(name, 14, seed=5, prompt=False, **ends)
    together = generate(model, mixed, cache, new=24)
    for place, i in enumerate(order):
        mine = made(name, 14, seed=5, prompt=False, **ends)
        alone = generate(model, row(inputs, i), mine, new=24)
        assert torch.allclose(alone.scores_[0], together.scores_[place], atol=1e-5)
        for layer in range(3):
            a, b = mine.kept_positions(layer)[0], cache.kept_positions(layer)[place]
            assert all(torch.equal(x[x >= 0], y[y >= 0]) for x, y in zip(a, b, strict=True))
    other = generate(model, mixed, made(name, 14, seed=6, prompt=False, **ends), new=24)
    assert not torch.equal(other.scores_, together.scores_)


@pytest.mark.parametrize("name", DRAWS)
def test_eviction_leaves_the_generator_of_sampling_alone(name: str) -> None:
    """A sampled reply is the same with a cache that draws and keeps everything as with none, and eviction moves no
    generator; nor does sampling move the draws."""
    inputs = batch(LENGTHS)
    assert torch.equal(sampled(inputs, made(name, 1.0), 20), sampled(inputs, None, 20))
    before = torch.random.get_rng_state()
    generate(zoo.model("llama"), inputs, made(name, 14, prompt=False), new=12)
    assert torch.equal(torch.random.get_rng_state(), before)
    kept = []
    for seed in (1, 2):
        cache = made(name, 14, prompt=False)
        torch.manual_seed(seed)
        generate(zoo.model("llama"), inputs, cache, new=12)
        kept.append(cache.kept_positions(1))
    assert torch.equal(*kept)


def test_a_fresh_draw_forgets_the_last_one() -> None:
    """Of slots that compete in n rounds, each with odds p, pⁿ are left: not the same winners every time."""
    cache = made("random-attention", 14, prompt=False, sinks=0, window=0, when=keepkv.When(every=6))
    generate(zoo.model("llama"), row(batch(LENGTHS), 0), cache, new=150)
    oldest = torch.cat([cache.kept_positions(layer).flatten() for layer in range(3)])
    assert (oldest >= 100).float().mean() > 0.9  # (14/20)¹⁰ is 3 %
    same = made("random", 14, sinks=0, when=keepkv.When(every=6))
    generate(zoo.model("llama"), row(batch(LENGTHS), 0), same, new=150)
    assert (torch.cat([same.kept_positions(layer).flatten() for layer in range(3)]) < 100).float().mean() > 0.2
