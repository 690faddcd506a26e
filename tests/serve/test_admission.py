"""Memory is reserved before anything is read: what does not fit waits, or is refused with the number."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import zoo
from serving import DOCUMENT, encoded, greedy, loaded, said, serving, told

import keepkv
from keepkv.errors import BudgetError, Busy, KeepKVError, TooLarge
from keepkv.plan.live import Live
from keepkv.serve.admission import MOST, Sizes
from keepkv.serve.batch.job import bytes_of
from keepkv.serve.batch.reading import Reader, late
from keepkv.serve.request import Compression, Finished, Token
from keepkv.tasks.length import positions_of

WHOLE = encoded(DOCUMENT)
LONG = (WHOLE * 10)[:1500]


@pytest.mark.parametrize(
    ("arch", "method", "budget"),
    [
        ("embedded", "full", None), ("embedded", "snapkv", 0.3), ("embedded", "adakv", 0.3), ("embedded", "h2o", 0.3),
        ("embedded", "keepkv2", 0.3), ("embedded", "many-questions", 0.3), ("embedded", "d2o", 0.3),
        ("embedded", "g-kv", 0.3), ("gemma3", "h2o", 0.3), ("gemma3", "full", None),
    ],
)  # fmt: skip
def test_a_prompt_takes_no_more_than_what_was_reserved(arch: str, method: str, budget: Any) -> None:
    """Tensors alive at once are counted as they are made. A bound that is far from the truth would be of no use: what
    it has beyond that is tiles of a fixed size."""
    model = loaded()[0] if arch == "embedded" else zoo.model(arch)
    sizes = Sizes.measured(model, 128, positions_of(model))
    vocabulary = model.config.get_text_config().vocab_size
    tokens = [x % vocabulary for x in LONG[:1400]]
    cache = late(keepkv.Cache(model, method, budget))
    with torch.inference_mode(), Live() as live:
        for _ in Reader(model, 128).document(cache, tokens, more=method != "full"):
            pass
    need = sizes.peak(cache, len(tokens))
    assert live.peak <= need <= 3 * live.peak + 2 * 4 * MOST, (live.peak, need)
    held, kept = bytes_of(cache), sizes.kept(cache, len(tokens))
    assert 0.8 * kept <= held <= 1.1 * kept + 200_000, (held, kept)


def test_what_can_never_fit_is_refused_with_the_number() -> None:
    with serving(memory=3_000_000) as engine:
        with pytest.raises(TooLarge, match="at its peak") as caught:
            engine.submit(greedy(LONG, 5))
        assert caught.value.needed > caught.value.limit == 3_000_000
        with pytest.raises(TooLarge, match="a context of 1,500 tokens"):
            engine.contexts.create("doc", LONG)
        assert engine.stats().refused == {"TooLarge": 2}
        assert said(engine.submit(greedy(LONG[:20], 3)))


def test_what_does_not_fit_now_waits() -> None:
    """Beside a reply that may still grow there is no room for the whole of another."""
    with serving() as engine:
        row = engine._row(greedy(WHOLE[:40], 1500), None)  # type: ignore[arg-type]
        engine.worker.ledger.limit = row.need + row.growth // 2
        one, two = (engine.submit(greedy(WHOLE[:40], 1500)) for _ in range(2))
        for _ in range(3):  # the first token is told before its row is counted
            assert isinstance(one.get(60), Token)
        stats = engine.stats()
        assert (stats.rows, stats.waiting) == (1, 1) and stats.reserved <= stats.limit
        one.cancel()
        assert isinstance(two.get(60), Token)
        two.cancel()
        assert told(two)[1].reason == "cancelled"  # type: ignore[union-attr]


def test_a_full_queue_is_refused_with_the_number() -> None:
    with serving(rows=1, queue=2) as engine:
        streams = [engine.submit(greedy(WHOLE[:40], 2000))]
        while not isinstance(streams[0].get(60), Token):
            pass
        streams += [engine.submit(greedy(WHOLE[:40], 2000)) for _ in range(2)]
        with pytest.raises(Busy, match="2 requests wait and no more may") as caught:
            engine.submit(greedy(WHOLE[:40], 2000))
        assert (caught.value.waiting, caught.value.limit) == (2, 2)
        for stream in streams:
            stream.cancel()
        assert [told(stream)[1].reason for stream in streams] == ["cancelled"] * 3  # type: ignore[union-attr]
        assert said(engine.submit(greedy(WHOLE[:40], 3)))


def test_jobs_begin_in_the_order_in_which_they_came() -> None:
    with serving(rows=1, queue=8) as engine:
        streams = [engine.submit(greedy(WHOLE[:200], 8)), *(engine.submit(greedy(WHOLE[:10], 2)) for _ in range(4))]
        ends = [told(stream)[1] for stream in streams]
    times = [x.times.admitted for x in ends if isinstance(x, Finished)]
    assert len(times) == 5 and times == sorted(times)


def test_limits_of_settings_hold() -> None:
    asked = Compression("snapkv", {}, 0.3)
    with serving(prompt=50, reply=6, budget=0.5, methods=("snapkv", "h2o"), compression=asked) as engine:
        assert engine.methods() == ("h2o", "snapkv") and engine.limit_tokens == 4096
        for request, error, words in (
            (greedy(WHOLE[:51], 3), TooLarge, "51 tokens of prompt, and here 50"),
            (greedy(WHOLE[:50], 7), TooLarge, "7 tokens of reply, and here 6"),
            (greedy(WHOLE[:50], 3, compression=Compression("adakv")), KeepKVError, "one of snapkv, h2o"),
            (greedy(WHOLE[:50], 3, compression=Compression(budget=0.6)), BudgetError, "50% of the tokens"),
            (greedy(WHOLE[:50], 3, compression=Compression(budget=26)), BudgetError, "50% of the tokens"),
            (greedy(WHOLE[:50], 3, compression=Compression(budget="1MiB")), BudgetError, "a share or slots"),
        ):
            with pytest.raises(error, match=words):
                engine.submit(request)
        assert said(engine.submit(greedy(WHOLE[:50], 6)))
        with pytest.raises(BudgetError):
            engine.contexts.create("doc", WHOLE[:50], "", Compression(budget=1.0))


def test_an_estimate_is_what_a_context_takes() -> None:
    asked = Compression("snapkv", {}, 0.25)
    with serving() as engine:
        kept, whole, peak = engine.estimate(len(LONG), asked)
        info = engine.contexts.create("doc", LONG, "", asked).result(120)
    assert kept == pytest.approx(info.bytes, rel=0.1) and whole == info.full_bytes and peak > whole


def test_what_caches_hold_is_measured() -> None:
    with serving() as engine:
        stream = engine.submit(greedy(LONG[:500], 3000))
        end = time.monotonic() + 60
        while not engine.stats().rows or engine.stats().bytes < engine.sizes.whole(500):
            assert time.monotonic() < end
            stream.get(60)
        stats = engine.stats()
        assert stats.bytes <= stats.reserved <= stats.limit
        stream.cancel()
        told(stream)
        while engine.stats().bytes:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert engine.stats().reserved == 0
