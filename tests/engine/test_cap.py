"""A hard cap: no layer ever holds more, whatever is read or decoded, or the forward is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from matrix import cache, cases, compresses, tolerance
from packaging.version import Version
from running import LENGTHS, batch, generate, plain, row

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.errors import BudgetError

Method = tuple[str, dict[str, Any]]
BUDGET, CAP = 14, 30
STREAM = keepkv.When(prefill=None, cap=CAP)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "arch" in metafunc.fixturenames:
        metafunc.parametrize(("arch", "method"), cases(metafunc))


def watched(mine: keepkv.Cache) -> list[float]:
    """Slots per KV head, a mean over all that share a budget, right after each append."""
    ours, seen = list(mine.compressible), [0.0]

    def watch(layer: Any) -> None:
        update = layer.update

        def updated(*args: Any, **kwargs: Any) -> Any:
            out = update(*args, **kwargs)
            sharing = ours if mine.settings.method.allocate.joint else [layer]
            held = torch.cat([x.store.lengths for x in sharing if x.is_initialized], dim=1)
            seen.append(float(held.double().mean(-1).max()))
            return out

        layer.update = updated

    for layer in ours:
        watch(layer)
    return seen


def test_no_layer_passes_the_cap(arch: str, method: Method) -> None:
    """A prompt of twice the cap in chunks, an answer, another turn: never more than the cap, and a compression only
    where it was needed."""
    if not compresses(method):
        pytest.skip("the full cache has no cap")
    if arch == "qwen2-vl" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this version of transformers cannot prefill Qwen2-VL in chunks, with its own cache neither")
    model, mine = zoo.model(arch), cache(arch, method, BUDGET, when=STREAM)
    held = watched(mine)
    out = generate(model, row(batch(), 0), mine, prefill_chunk_size=8, new=20)
    ids = torch.cat((out.sequences, torch.full((1, 7), 5)), dim=1)
    out = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, mine, new=4)
    assert CAP - 8 < max(held) <= CAP
    assert torch.isfinite(out.scores_).all()
    most = -(-(ids.shape[1] + 4 - CAP) // (CAP - BUDGET - 8)) + 1
    assert 1 <= mine.report().compressions / len(mine.compressible) <= most


def test_rows_reach_the_cap_one_by_one(arch: str, method: Method) -> None:
    """Rows of a padded batch are compressed when each is full, and give what they give alone."""
    if not compresses(method):
        pytest.skip("the full cache has no cap")
    model, inputs, cap = zoo.model(arch), batch(), keepkv.When(prefill=None, cap=36)
    inputs = {name: x[1:, -LENGTHS[1] :] for name, x in inputs.items()}
    mine = cache(arch, method, BUDGET, when=cap)
    together = generate(model, inputs, mine, new=9)
    for i in range(2):
        alone_cache = cache(arch, method, BUDGET, when=cap)
        alone = generate(model, row(inputs, i), alone_cache, new=9)
        assert torch.allclose(alone.scores_[0], together.scores_[i], atol=tolerance(method))
        kept, kept_alone = mine.report().kept, alone_cache.report().kept
        assert all(kept[layer][i] == kept_alone[layer][0] for layer in kept)
        assert alone_cache.report().compressed == (i == 0)


# --- one method, one model ---------------------------------------------------------------------------------------


def made(budget: Any = BUDGET, method: str = "snapkv", **when: Any) -> keepkv.Cache:
    when = {"prefill": None, "cap": CAP, **when}
    small = {"sinks": 2, "window": 4} if method == "snapkv" else {"sinks": 2}
    return keepkv.Cache(zoo.model("llama"), method, budget, **small, when=keepkv.When(**when))


@torch.no_grad()
def feed(mine: keepkv.Cache, count: int, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(3, zoo.VOCAB, (1, count), generator=torch.Generator().manual_seed(seed))
    return zoo.model("llama")(input_ids=ids, **{CACHE: mine}).logits


def test_below_the_cap_nothing_happens() -> None:
    model = zoo.model("llama")
    mine = keepkv.Cache(model, "snapkv", BUDGET, when=keepkv.When(prefill=None, cap=68), sinks=2, window=4)
    out = generate(model, batch(), mine)
    assert torch.equal(out.sequences, plain("llama").sequences) and not mine.report().compressed


@pytest.mark.parametrize("first", [0, 20])
def test_a_forward_that_does_not_fit_is_refused_and_changes_nothing(first: int) -> None:
    mine = made()
    if first:
        feed(mine, first)
    twin = mine.copy()
    with pytest.raises(BudgetError, match=rf"31 tokens does not fit under When\(cap=30\).*chunk_size={CAP - BUDGET}\)"):
        feed(mine, 31)
    with pytest.raises(BudgetError, match="larger cap") if first else pytest.raises(AssertionError):
        feed(mine, CAP - BUDGET + 1)  # more than a compression makes room for
        raise AssertionError("an empty cache takes as much as its cap")
    if first:
        assert mine.report().kept == twin.report().kept and not mine.report().compressed
        assert torch.equal(feed(mine, 10, 2), feed(twin, 10, 2))
        feed(mine, CAP - BUDGET, 3)
        assert mine.report().kept[0] == [[CAP, CAP]]


def test_a_share_leaves_no_more_than_has_room() -> None:
    """90% of the tokens soon are more than the cap: a compression leaves what fits beside the forward."""
    mine = made(budget=0.9)
    held = watched(mine)
    for i in range(12):
        feed(mine, 7, i)
    assert max(held) == CAP and mine.report().compressions > 0
    feed(mine, 24, 20)
    assert max(held) == CAP
    with pytest.raises(BudgetError, match="6 slots per head"):  # sinks and window stay
        feed(mine, 25)


def test_what_cannot_work_is_refused_when_it_is_made() -> None:
    with pytest.raises(BudgetError, match="a cap of 14 slots per head leaves no room beside the 14"):
        made(cap=BUDGET)
    with pytest.raises(BudgetError, match="leaves no room beside the 6"):
        made(budget=0.5, cap=6)
    with pytest.raises(keepkv.KeepKVError, match="cap"):
        keepkv.When(cap=0)


def test_questions_that_are_not_compressed_stay_below_the_cap_too() -> None:
    mine = made(method="knorm")  # what a score remembers of queries is freed with compressing = False
    feed(mine, 25)
    mine.compressing = False
    feed(mine, 5)
    with pytest.raises(BudgetError, match="compressing is False"):
        feed(mine, 1)
    mine.crop(-5)
    mine.compressing = True
    feed(mine, 10)


def test_files_copies_and_rows_keep_the_cap(tmp_path: Path) -> None:
    mine = made()
    feed(mine, 28)
    mine.save(tmp_path / "cache")
    loaded, twin = keepkv.Cache.load(tmp_path / "cache", zoo.model("llama")), mine.copy()
    assert loaded.settings.method.when == mine.settings.method.when
    twin.batch_repeat_interleave(2)
    for one in (mine, loaded):
        held = watched(one)
        feed(one, 6, 1)
        assert max(held) <= CAP and one.report().compressed
    assert mine.report().kept == loaded.report().kept
    held = watched(twin)
    with torch.no_grad():
        ids = torch.randint(3, zoo.VOCAB, (1, 6), generator=torch.Generator().manual_seed(1)).expand(2, -1)
        zoo.model("llama")(input_ids=ids, **{CACHE: twin})
    assert max(held) <= CAP and twin.report().kept[0][1] == mine.report().kept[0][0]


def test_beams_share_a_cap() -> None:
    mine = made(cap=64)
    held = watched(mine)
    generate(zoo.model("llama"), row(batch(), 0), mine, new=12, num_beams=3)
    assert max(held) <= 64 and mine.report().compressed
