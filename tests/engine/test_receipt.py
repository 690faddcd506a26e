"""Bytes measured on storage, budgets in every form, and a receipt that does not claim what did not happen."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import zoo
from matrix import METHODS
from running import batch, generate, row
from transformers import LlamaConfig, LlamaForCausalLM

import keepkv
from keepkv.core.budget import Budget
from keepkv.engine.versions import CACHE
from keepkv.errors import BudgetError

PROMPT = 400
HEADS, LAYERS, DIM = 2, 2, 128


@cache
def wide() -> LlamaForCausalLM:
    """A model with head dim 128, as real ones have: a slot weighs 1 kB, so what is kept beside it shows at 1 %."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=zoo.VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=HEADS, head_dim=DIM, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prefill(cache: keepkv.Cache, prompt: int = PROMPT, rows: int = 1) -> keepkv.Receipt:
    ids = torch.randint(3, zoo.VOCAB, (rows, prompt))
    with torch.no_grad():
        wide()(input_ids=ids, **{CACHE: cache})
        wide()(input_ids=ids[:, :1], **{CACHE: cache})  # the query window is given up with the first decoded token
    return cache.report()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5])
def test_bytes_stay_within_the_budget(method: tuple[str, dict[str, Any]], budget: float) -> None:
    """3. bytes ≤ budget × full_bytes × 1.03 + protected slots, storage included that decode has allocated ahead."""
    cache = keepkv.Cache(wide(), method[0], budget, **method[1])
    if method[0] == "full":
        receipt = prefill(cache)
        assert receipt.bytes >= receipt.full_bytes and not receipt.compressed
        return
    ids = torch.randint(3, zoo.VOCAB, (2, PROMPT))
    with torch.no_grad():
        wide()(input_ids=ids, **{CACHE: cache})
    state = sum(x.numel() * x.element_size() for layer in cache.compressible for x in layer.score_state.values())
    receipt = cache.report()
    assert receipt.compressed and receipt.full_bytes == 2 * LAYERS * HEADS * PROMPT * 2 * DIM * 4
    protected = cache.settings.method.sinks + cache.settings.method.window
    floor = protected * receipt.full_bytes / PROMPT if protected > budget * PROMPT else 0
    assert receipt.bytes - state <= budget * receipt.full_bytes * 1.03 + floor
    slots = [sum(heads) for layer in receipt.kept.values() for heads in layer]
    assert sum(slots) == pytest.approx(2 * LAYERS * HEADS * budget * PROMPT, abs=LAYERS * HEADS * 2)
    assert state == 0 or cache.settings.method.score.observes


def test_adaptive_heads_free_memory() -> None:
    """Head-adaptive budgets at 0.25 hold at most 0.26 of the full cache's bytes (a mask frees nothing: 1.00)."""
    cache = keepkv.Cache(wide(), "adakv", 0.25, window=8)
    receipt = prefill(cache, prompt=1600)
    lengths = receipt.kept[0][0]
    assert len(set(lengths)) > 1  # heads really differ
    tensors = [pair for layer in cache.compressible for pair in layer.store.tensors().items()]
    tail = sum(x.nbytes for name, x in tensors if name.startswith("tail."))
    assert (receipt.bytes - tail) / receipt.full_bytes <= 0.26


def test_budget_in_bytes_is_kept() -> None:
    for method, slots in (("snapkv", "dense"), ("keepkv", "dense"), ("adakv", "flat")):
        cache = keepkv.Cache(wide(), method, "500KiB", window=8)
        ids = torch.randint(3, zoo.VOCAB, (2, PROMPT))
        with torch.no_grad():
            wide()(input_ids=ids, **{CACHE: cache})
        held = sum(layer.store.nbytes for layer in cache.compressible)
        assert 0.93 * 500 * 1024 < held <= 500 * 1024, slots
    with pytest.raises(BudgetError, match="one slot in every layer"):
        prefill(keepkv.Cache(wide(), "random", "1KiB", sinks=0))


def test_hybrid_models_count_their_sliding_layers() -> None:
    """A byte budget leaves room for what transformers' own sliding layers hold."""
    cache = keepkv.Cache(zoo.model("gemma3"), "random", "12KiB", sinks=0)
    generate(zoo.model("gemma3"), row(batch(), 0), cache, new=2)
    stores = [layer.store for layer in cache.compressible]
    since = sum(x.tensors()["keys"].shape[2] - (x.length - x.appended) for x in stores)  # the decoded token and slack
    held = cache.report().bytes - since * 2 * (2 * 16 * 4 + 4)
    assert 11 * 1024 < held <= 12 * 1024 + 64


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (0.1, Budget(share=0.1)),
        (1.0, Budget(share=1.0)),
        (64, Budget(slots=64)),
        ("256MiB", Budget(bytes=256 << 20)),
        ("1.5 GB", Budget(bytes=1_500_000_000)),
        ("0.25", Budget(share=0.25)),
        ("128", Budget(slots=128)),
    ],
)
def test_budget_forms(given: Any, read: Budget) -> None:
    assert Budget.of(given) == read and Budget.of(read) == read and Budget.of(read.value) == read


@pytest.mark.parametrize("given", [0, -3, 0.0, 1.5, True, "lots", "5 parsecs", None, [1]])
def test_impossible_budgets(given: Any) -> None:
    with pytest.raises(BudgetError, match="share"):
        Budget.of(given)


def test_share_counts_exactly() -> None:
    """n·b without binary rounding: 0.1 of 100 tokens is 10 slots, 0.7 of 10 is 7."""
    for tokens, share, slots in [(100, 0.1, 10), (10, 0.7, 7), (30, 0.3, 9), (7, 0.5, 3)]:
        assert Budget.of(share).per_head(torch.tensor([tokens]), 1).tolist() == [slots]


def test_budget_below_what_is_always_kept() -> None:
    with pytest.raises(BudgetError, match=r"below the 36"):
        keepkv.Cache(wide(), "snapkv", 20)
    with pytest.raises(BudgetError, match="needs a budget"):
        keepkv.Cache(wide(), "snapkv")


def test_receipt_says_when_nothing_was_compressed() -> None:
    cache = keepkv.Cache(wide(), "snapkv", 600)
    receipt = prefill(cache)
    assert not receipt.compressed and "nothing was compressed" in str(receipt)
    cache = keepkv.Cache(wide(), "snapkv", 100)
    receipt = prefill(cache)
    assert receipt.compressed and "nothing was compressed" not in str(receipt)
    assert receipt.dropped == LAYERS * HEADS * (PROMPT - 100) and receipt.merged == 0 and receipt.largest_vote == 1.0
    assert receipt.mass_dropped is not None and 0 < receipt.mass_dropped < 1
    assert receipt.to_dict()["ratio"] == receipt.ratio and receipt.seconds > 0


@pytest.mark.parametrize("key", ["zip", "code"])
@pytest.mark.parametrize("every", [None, 4])
def test_votes_and_drops_account_for_every_token(key: str, every: int | None) -> None:
    """6. Integer votes of all slots + tokens dropped = tokens seen, in each layer, row and head, over a whole run."""
    model = zoo.model("llama")
    cache = keepkv.Cache(model, "keepkv", 14, key=key, threshold=0.2, window=4, sinks=2, when=keepkv.When(every=every))
    generate(model, batch(), cache, new=10)
    seen, receipt = torch.tensor(cache.report().seen), cache.report()
    assert receipt.merged > 0 and receipt.largest_vote >= 2
    for layer in cache.compressible:
        slots = layer.store.view()
        votes = (slots.log_votes.double().exp() * slots.valid).sum(-1)
        assert torch.allclose(votes, votes.round(), atol=1e-4)
        # A dropped slot takes its votes with it: what left is counted in votes, not in slots.
        gone = layer.tally.votes_dropped
        assert gone is not None and torch.allclose(gone, gone.round(), atol=1e-4)
        assert torch.equal((votes + gone).round().long(), seen[:, None].expand_as(votes))


def test_merged_run_without_merges_is_not_called_one() -> None:
    """A threshold that nothing passes: the receipt shows zero merges and bit-identical plain eviction."""
    model, options = zoo.model("llama"), {"window": 4, "sinks": 2}
    merged = keepkv.Cache(model, "keepkv", 14, key="zip", threshold=1.5, score="snapkv", **options)
    evicted = keepkv.Cache(model, "snapkv", 14, **options)
    outs = [generate(model, batch(), c).scores_ for c in (merged, evicted)]
    assert torch.equal(*outs)
    assert merged.report().merged == 0 and merged.report().dropped == evicted.report().dropped > 0
