"""Rows decode with as many threads as are fastest, prompts are read with all, and nobody else's number changes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from serving import greedy, loaded, serving, told

from keepkv.serve.batch import threads as module
from keepkv.serve.batch.decode import Decoder
from keepkv.serve.batch.threads import fastest, threads_of


@pytest.fixture(autouse=True)
def of_torch() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [({1: 1.0, 2: 1.5, 4: 3.0}, 1), ({1: 1.0, 2: 0.6, 4: 0.59}, 2), ({1: 1.0, 2: 0.97, 4: 0.5}, 4)],
)
def test_more_threads_only_where_they_pay(monkeypatch: Any, seconds: dict[int, float], best: int) -> None:
    monkeypatch.setattr(module, "_seconds", lambda run: seconds[torch.get_num_threads()])
    assert fastest(lambda: None) == best
    assert torch.get_num_threads() == 5


def test_a_number_that_is_no_power_of_two_is_tried(monkeypatch: Any) -> None:
    torch.set_num_threads(4)
    seen = list[int]()
    monkeypatch.setattr(module, "_seconds", lambda run: seen.append(torch.get_num_threads()) or 1.0 / len(seen))
    assert fastest(lambda: None) == 3
    assert seen == [1, 2, 3]


def test_one_core_is_left_to_those_who_talk_to_clients(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_seconds", lambda run: 1 / torch.get_num_threads())
    assert [_best_of(n) for n in (1, 2, 3, 6)] == [1, 1, 2, 5]


def _best_of(threads: int) -> int:
    torch.set_num_threads(threads)
    return fastest(lambda: None)


def test_what_is_asked_for_is_taken_and_what_was_comes_back() -> None:
    model, _ = loaded()
    decoder = Decoder(model, 4, threads=2)
    assert decoder.threads == 2
    with pytest.raises(ZeroDivisionError), threads_of(decoder.threads):
        assert torch.get_num_threads() == 2
        raise ZeroDivisionError
    assert torch.get_num_threads() == 5


def test_prompts_are_read_by_all_and_rows_decode_by_some(monkeypatch: Any) -> None:
    model, _ = loaded()
    forward, seen = type(model).forward, set[tuple[bool, int]]()

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name == "keepkv-serve":
            seen.add((kwargs["input_ids"].shape[1] > 1, torch.get_num_threads()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    with serving(threads=1) as engine:
        told(engine.submit(greedy(tuple(range(5, 45)), 3)))
        assert engine.stats().threads == 1
    assert seen == {(True, 5), (False, 1)}
