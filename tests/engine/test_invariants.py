"""Invariants that every method holds on every architecture, and every store with three of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from matrix import cache, calibration, cases, compresses, tolerance
from packaging.version import Version
from running import LENGTHS, batch, generate, hot, plain, row

import keepkv
from keepkv.engine.allowance import layer_budget
from keepkv.engine.versions import CACHE
from keepkv.errors import CacheStateError, CalibrationError, UnsupportedModel

Method = tuple[str, dict[str, Any]]
BUDGET = 14


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize(("arch", "method"), cases(metafunc))


def test_full_budget_is_the_plain_cache(arch: str, method: Method) -> None:
    """1. Budget 1.0: same tokens and logits as transformers' own cache, decode compression included."""
    mine = cache(arch, method, 1.0, when=keepkv.When(every=3)) if compresses(method) else cache(arch, method, 1.0)
    out = generate(zoo.model(arch), batch(), mine)
    if tolerance(method) > 1e-5:  # one token may follow another: the first is compared
        assert torch.allclose(out.scores_[:, 0], plain(arch).scores_[:, 0], atol=tolerance(method))
    else:
        assert torch.equal(out.sequences, plain(arch).sequences)
        assert torch.allclose(out.scores_, plain(arch).scores_, atol=1e-5)
    assert mine.report().compressions == 0 and not mine.report().compressed


def test_storage_stays_within_the_budget(arch: str, method: Method) -> None:
    """3. Keys and values stored after a prompt: no more than the budget, measured on storage, in total over layers and
    heads. (What lies beside them, and shares as budgets, is weighed on a model with real head dims in test_receipt.)"""
    if not compresses(method):
        pytest.skip("the full cache has no budget")
    if method[1].get("store") == "static":
        pytest.skip("static buffers are as large as they were made")
    mine, inputs = cache(arch, method, BUDGET), batch()
    with torch.no_grad():
        zoo.model(arch)(**inputs, **{CACHE: mine})
    mine.compress()  # where layers share slots, it would be the next forward that compresses
    held = allowed = 0
    for layer in mine.compressible:
        assert torch.equal(layer.store.positions(), layer.store.view().positions)
        plain = layer.store.slot_bytes().plain
        names = ("keys", "values")
        held += sum(x.untyped_storage().nbytes() for n, x in layer.store.tensors().items() if n.endswith(names))
        allowed += len(LENGTHS) * BUDGET * plain
    assert 0 < held <= allowed * 1.03


@pytest.mark.parametrize("every", [3, pytest.param(None, marks=pytest.mark.slow)])
def test_padded_batch_equals_single_rows(arch: str, method: Method, every: int | None) -> None:
    """2. Left padding: each row gives what it gives alone, for prefill and decode compression, finite throughout."""
    options = {"when": keepkv.When(every=every)} if compresses(method) else {}
    model, inputs = zoo.model(arch), batch()
    mine = cache(arch, method, BUDGET, **options)
    together = generate(model, inputs, mine)
    if compresses(method):
        assert mine.report().compressed
        assert not torch.equal(together.scores_, plain(arch).scores_)  # the check is not vacuous
    for i in range(len(LENGTHS)):
        alone_cache = cache(arch, method, BUDGET, **options)
        alone = generate(model, row(inputs, i), alone_cache)
        assert torch.isfinite(alone.scores_).all()
        assert torch.allclose(alone.scores_[0], together.scores_[i], atol=tolerance(method)), (
            f"row {i}: {(alone.scores_[0] - together.scores_[i]).abs().max()}"
        )
        kept, kept_alone = mine.report().kept, alone_cache.report().kept
        assert all(kept[layer][i] == kept_alone[layer][0] for layer in kept)


def test_chunked_prefill_is_bounded(arch: str, method: Method) -> None:
    """4. With chunked prefill no layer ever stores more than budget + chunk; deferred, it equals one-shot prefill."""
    if not compresses(method):
        pytest.skip("the full cache has no budget")
    if arch == "qwen2-vl" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this version of transformers cannot prefill Qwen2-VL in chunks, with its own cache neither")
    model, chunk, inputs = zoo.model(arch), 8, row(batch(), 0)
    mine = cache(arch, method, BUDGET)
    ours, longest = list(mine.compressible), 0
    for layer in ours:
        append = layer.store.append

        def watch(*args: Any, append: Any = append, layer: Any = layer, **known: Any) -> None:
            nonlocal longest
            append(*args, **known)
            # Ragged heads share one budget, and layers may: what is bounded is the mean over all that share.
            sharing = ours if mine.settings.method.allocate.joint else [layer]
            held = [x.store.lengths for x in sharing if x.is_initialized]
            longest = max(longest, int(torch.cat(held, dim=1).sum(-1).max()) / sum(x.shape[1] for x in held))

        layer.store.append = watch  # type: ignore[method-assign]
    generate(model, inputs, mine, prefill_chunk_size=chunk, new=2)
    deepest = max(int(layer_budget(layer).max()) for layer in ours)
    assert 0 < longest <= deepest + chunk
    deferred = {"when": keepkv.When(prefill="deferred")}
    chunked = generate(model, inputs, cache(arch, method, BUDGET, **deferred), prefill_chunk_size=chunk)
    one_shot = generate(model, inputs, cache(arch, method, BUDGET, **deferred))
    assert torch.allclose(chunked.scores_[:, 0], one_shot.scores_[:, 0], atol=tolerance(method))
    if tolerance(method) == 1e-5:
        assert torch.allclose(chunked.scores_, one_shot.scores_, atol=1e-5)


def test_second_turn_feeds_only_new_tokens(arch: str, method: Method) -> None:
    """5. Multi-turn: the second generate feeds what is new, at positions that continue from the tokens seen."""
    model, mine = zoo.model(arch), cache(arch, method, BUDGET)
    first = generate(model, row(batch(), 0), mine)
    new = torch.randint(3, zoo.VOCAB, (1, 7))
    ids = torch.cat((first.sequences, new), dim=1)
    fed: list[tuple[int, list[int]]] = []

    def spy(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids")
        flat = [] if positions is None else positions.reshape(-1, positions.shape[-1])[-1].tolist()
        fed.append((kwargs["input_ids"].shape[1], flat))

    hook = model.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        out = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, mine)
    finally:
        hook.remove()
    seen = first.sequences.shape[1] - 1  # the last generated token was not fed yet
    assert fed[0][0] == 8 and fed[0][1] in ([], list(range(seen, seen + 8)))
    assert all(length == 1 for length, _ in fed[1:])
    assert mine.report().seen == [ids.shape[1] + 5] and torch.isfinite(out.scores_).all()


def test_state_follows_the_rows(arch: str, method: Method, tmp_path: Path) -> None:
    """8. After compressions, a reordered, a copied, and a saved and loaded cache go on as the original does, and a
    reset one starts afresh."""
    model, order = zoo.model(arch), torch.tensor([2, 0, 1])
    mine = cache(arch, method, BUDGET, **({"when": keepkv.When(every=3)} if compresses(method) else {}))
    first = generate(model, batch(), mine, new=3)
    loaded, swapped, untouched = mine.copy(), mine.copy(), mine.copy()
    try:
        mine.save(tmp_path / "cache")
        loaded = keepkv.Cache.load(tmp_path / "cache", model, calibration=calibration(method, model))
    except CacheStateError as error:  # transformers' own static layers
        assert method[1].get("store") == "static" and "cannot be saved" in str(error)
    swapped.reorder_cache(order)
    mask = torch.cat((batch()["attention_mask"], torch.ones(3, 2, dtype=torch.long)), dim=1)
    feed = first.sequences[:, -1:]
    with torch.no_grad():
        for _ in range(4):  # long enough for another compression
            mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), dim=1)
            step = {"input_ids": feed, "attention_mask": mask, "position_ids": mask.sum(-1, keepdim=True) - 1}
            out = model(**step, **{CACHE: mine}).logits
            again = model(**step, **{CACHE: loaded}).logits
            moved = model(**{name: x[order] for name, x in step.items()}, **{CACHE: swapped}).logits
            # A file holds contiguous tensors: the same numbers, summed in another order. Where the next compression
            # writes codes of what follows from them, a code may be the one beside; test_bit_exact compares bits.
            near = tolerance(method)
            assert torch.allclose(out, again, atol=near) and torch.allclose(out[order], moved, atol=near)
            feed = out.argmax(-1)
    assert untouched.get_seq_length() == mine.get_seq_length() - 4
    mine.reset()
    assert torch.equal(generate(model, batch(), mine, new=3).scores_, first.scores_)


def test_extreme_logits_stay_finite(arch: str, method: Method) -> None:
    """9. Attention logits beyond ±200 in bfloat16: nothing overflows, and two runs are identical."""
    model = hot(arch)
    options = {"when": keepkv.When(every=3)} if compresses(method) else {}
    try:
        known = {"calibration": calibration(method, model)}
        caches = [keepkv.Cache(model, method[0], BUDGET, **{**method[1], **options, **known}) for _ in range(2)]
    except (CalibrationError, UnsupportedModel):
        pytest.skip("refused as it should be")
    outs = [generate(model, batch(), c).scores_ for c in caches]
    assert torch.isfinite(outs[0]).all() and torch.equal(*outs)
    for layer in caches[0].compressible:
        slots = layer.store.view()
        assert all(torch.isfinite(x[slots.valid]).all() for x in (slots.keys, slots.values, slots.log_votes))


def test_caches_do_not_meet(arch: str, method: Method) -> None:
    """10. Two caches used in turn on one model give what each gives by itself; repeated runs are identical."""
    model, one, two = zoo.model(arch), row(batch(), 0), row(batch(seed=1), 1)
    alone = [generate(model, x, cache(arch, method, BUDGET)).scores_ for x in (one, two)]
    caches = [cache(arch, method, BUDGET) for _ in range(2)]
    logits: list[list[torch.Tensor]] = [[], []]
    feeds = [x["input_ids"] for x in (one, two)]
    with torch.no_grad():
        for _ in range(6):
            for i in range(2):
                out = model(input_ids=feeds[i], **{CACHE: caches[i]}).logits[:, -1]
                logits[i].append(out)
                feeds[i] = out.argmax(-1, keepdim=True)
    for i in range(2):
        assert torch.allclose(torch.stack(logits[i], dim=1), alone[i], atol=1e-5)
