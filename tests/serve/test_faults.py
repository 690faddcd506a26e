"""What goes wrong in one request ends that request."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from serving import DOCUMENT, encoded, greedy, said, serving, told

from keepkv.engine.layer import Layer
from keepkv.errors import Stopped
from keepkv.serve.batch.decode import Decoder
from keepkv.serve.batch.reading import Reader
from keepkv.serve.engine import Engine
from keepkv.serve.request import Failed, Finished, Token

WHOLE = encoded(DOCUMENT)


def until(true: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def test_a_row_that_fails_while_it_decodes_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its token is written together with others or by itself."""
    update, wrote = Layer.update, Layer.wrote

    def check(layer: Layer) -> None:
        if layer.progress.seen == 75 and layer.info.index == 2:
            raise RuntimeError("injected")

    def by_itself(self: Layer, *given: Any, **kwargs: Any) -> Any:
        found = update(self, *given, **kwargs)
        check(self)
        return found

    def together(self: Layer) -> None:
        wrote(self)
        check(self)

    asked = [greedy(WHOLE[: 40 + 10 * i], 20) for i in range(4)]
    with serving() as engine:
        whole = [said(stream) for stream in [engine.submit(one) for one in asked]]
        monkeypatch.setattr(Layer, "update", by_itself)
        monkeypatch.setattr(Layer, "wrote", together)
        replies = [told(stream) for stream in [engine.submit(one) for one in asked]]
        failed = [i for i, (_, end) in enumerate(replies) if isinstance(end, Failed)]
        assert failed == [2, 3], "those of 60 and 70 tokens reach 75 within their replies"
        assert [end.error for _, end in replies if isinstance(end, Failed)] == ["RuntimeError: injected"] * 2
        for i in (0, 1):
            tokens, end = replies[i]
            assert isinstance(end, Finished) and "".join(x.text for x in tokens) + end.text == whole[i]
        monkeypatch.setattr(Layer, "update", update)
        monkeypatch.setattr(Layer, "wrote", wrote)
        assert said(engine.submit(asked[2])) == whole[2]
        assert engine.stats().finished["failed"] == 2 and engine.worker.ledger.reserved == 0


def test_a_prompt_that_fails_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Reader._read

    def sometimes(self: Reader, cache: Any, part: Any) -> Any:
        if len(part) == 33:
            raise MemoryError("injected")
        return read(self, cache, part)

    monkeypatch.setattr(Reader, "_read", sometimes)
    with serving() as engine:
        bad, good = engine.submit(greedy(WHOLE[: 64 + 33])), engine.submit(greedy(WHOLE[:64]))
        assert said(good)
        end = told(bad)[1]
        assert isinstance(end, Failed) and end.error == "MemoryError: injected" and not end.refused


def test_a_forward_that_fails_ends_its_rows_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = Decoder._forward, [0]

    def once(self: Any, *given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("injected")
        return forward(self, *given)

    with serving() as engine:
        monkeypatch.setattr(Decoder, "_forward", once)
        end = told(engine.submit(greedy(WHOLE[:40], 8)))[1]
        assert isinstance(end, Failed) and "injected" in end.error
        assert said(engine.submit(greedy(WHOLE[:40], 8)))


def test_a_fault_of_the_server_itself_ends_what_runs_and_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as engine:
        step = engine.worker.decoder.step
        monkeypatch.setattr(engine.worker.decoder, "step", lambda *_: 1 / 0)
        end = told(engine.submit(greedy(WHOLE[:40], 8)))[1]
        assert isinstance(end, Failed) and end.error.startswith("ZeroDivisionError")
        monkeypatch.setattr(engine.worker.decoder, "step", step)
        assert said(engine.submit(greedy(WHOLE[:40], 8)))


def test_a_reply_that_is_cancelled_frees_its_row() -> None:
    with serving(rows=1) as engine:
        long, after = engine.submit(greedy(WHOLE[:40], 3000)), engine.submit(greedy(WHOLE[:30], 4))
        while not isinstance(long.get(60), Token):
            pass
        long.cancel()
        assert said(after)
        end = told(long)[1]
        assert isinstance(end, Finished) and end.reason == "cancelled" and end.completion_tokens <= 3000
        waiting = [engine.submit(greedy(WHOLE[:40], 2000)) for _ in range(3)]
        for stream in waiting:
            stream.cancel()
        assert [told(stream)[1].reason for stream in waiting] == ["cancelled"] * 3  # type: ignore[union-attr]
        until(lambda: engine.stats().reserved == 0)


def test_running_rows_do_not_starve_while_a_long_prompt_is_read() -> None:
    with serving(chunk=16) as engine:
        row = engine.submit(greedy(WHOLE[:20], 3000))
        while not isinstance(row.get(60), Token):
            pass
        before = engine.worker.counts["steps"]
        long = engine.submit(greedy(WHOLE[:320], 1))
        end = told(long)[1]
        between = engine.worker.counts["steps"] - before
        row.cancel()
    assert isinstance(end, Finished) and between >= 320 // 16 - 1


def test_a_stop_drains_then_cancels() -> None:
    with serving() as engine:
        short, long = engine.submit(greedy(WHOLE[:20], 3)), engine.submit(greedy(WHOLE[:20], 4000))
        while not isinstance(long.get(60), Token):
            pass
        stopping = threading.Thread(target=engine.stop, args=(1.0,))
        stopping.start()
        until(lambda: engine.stats().state != "running")
        with pytest.raises(Stopped):
            engine.submit(greedy(WHOLE[:20], 3))
        assert said(short)
        end = told(long)[1]
        assert isinstance(end, Finished) and end.reason == "cancelled"
        stopping.join()
        assert engine.stats().state == "stopped"


def test_an_engine_that_was_not_started_says_so() -> None:
    from serving import loaded

    with pytest.raises(Stopped, match="not been started"):
        Engine(*loaded()).submit(greedy(WHOLE[:20], 3))


def test_events_come_to_who_listens() -> None:
    found: list[Any] = []
    with serving() as engine:
        engine.submit(greedy(WHOLE[:20], 3), found.append)
        until(lambda: found and isinstance(found[-1], Finished))
    assert [type(x) for x in found] == [Token, Token, Token, Finished]


def test_a_listener_that_fails_ends_its_own_reply() -> None:
    def refuse(event: Any) -> None:
        raise RuntimeError("the client's loop is closed")

    with serving() as engine:
        engine.submit(greedy(WHOLE[:20], 30), refuse)
        assert said(engine.submit(greedy(WHOLE[:20], 3)))
        until(lambda: engine.stats().rows == 0 and engine.stats().reserved == 0)
