"""What a request took is given back, however it ended."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import pytest
from serving import DOCUMENT, QUESTIONS, encoded, greedy, serving, told

from keepkv.engine.layer import Layer
from keepkv.serve.engine import Engine
from keepkv.serve.request import Compression

WHOLE, QUESTION = encoded(DOCUMENT), encoded(QUESTIONS[0].prompt, first=False)
ASKED = Compression("snapkv", {"window": 8}, 0.5)


def run(engine: Engine, count: int) -> None:
    """Requests of many kinds, some of which are cancelled, or fail."""
    kinds: list[Callable[[], object]] = [
        lambda: engine.submit(greedy(WHOLE[:30], 3)),
        lambda: engine.submit(greedy(WHOLE[:50], 3, compression=ASKED, receipt=True)),
        lambda: engine.submit(greedy(QUESTION, 3, context="doc")),
        lambda: engine.submit(greedy(WHOLE[:40], 3, compression=Compression("snapkv", {}, "1KiB"))),
        lambda: engine.submit(greedy(WHOLE[:20], 500)).cancel(),
    ]
    for n in range(0, count, 4):
        for stream in [kinds[(n + i) % len(kinds)]() for i in range(4)]:
            if stream is not None:
                told(stream)  # type: ignore[arg-type]


def layers() -> int:
    gc.collect()
    return sum(isinstance(x, Layer) for x in gc.get_objects())


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_no_layer_is_left_of_a_request() -> None:
    with serving() as engine:
        engine.contexts.create("doc", WHOLE[:80], "", ASKED).result(60)
        before = layers()
        run(engine, 20)
        engine.stop(60)  # those that were cancelled are gone too
        assert layers() == before and engine.stats().reserved == engine.contexts.get("doc").bytes


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory of the process is read from Linux")
def test_memory_is_flat_over_thousands_of_requests() -> None:
    with serving() as engine:
        engine.contexts.create("doc", WHOLE[:80], "", ASKED).result(60)
        run(engine, 400)
        before = resident()
        run(engine, 3000)
        assert resident() - before < 8 << 20
        assert sum(engine.stats().finished.values()) >= 3300
