"""Servers in this process, on a free port of the loopback address; as a plugin of pytest, one of the embedded model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from keepkv.embedded import CHAT_TEMPLATE, embedded_model
from keepkv.serve.config import read_config
from keepkv.serve.engine import Engine
from keepkv.serve.http.app import front_of
from keepkv.serve.http.front import Front
from keepkv.serve.http.run import Server, reach


def model_and_tokenizer() -> tuple[Any, Any]:
    """The embedded ones, as ``keepkv serve`` serves them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = CHAT_TEMPLATE
    return AutoModelForCausalLM.from_pretrained(path).eval(), tokenizer


@contextmanager
def serving(engine: Any, tokenizer: Any, model: Any = None, **fields: Any) -> Iterator[tuple[str, Front]]:
    """A server of ``engine``, started here: its URL and its front. fields: of the configuration."""
    config = read_config(None, {"port": 0, **fields})
    front = front_of(engine, tokenizer, config, 4096 if model is None else reach(model))
    listening, found = threading.Event(), []

    def ready(url: str) -> None:
        found.append(url)
        listening.set()

    server = Server(front, ready)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert listening.wait(60), "the server did not start"
        yield found[0], front
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """The embedded model and its tokenizer."""
    return model_and_tokenizer()


@pytest.fixture(scope="module")
def real(loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Front]]:
    """A server of the embedded model by the real engine."""
    fields = {"contexts": tmp_path_factory.mktemp("contexts"), "memory": "1GiB", "max_body": "1MiB"}
    with running(*loaded, **fields) as found:
        yield found


@contextmanager
def running(model: Any, tokenizer: Any, **fields: Any) -> Iterator[tuple[str, Front]]:
    """A server of ``model`` by the real engine, started and stopped here."""
    engine = Engine(model, tokenizer, read_config(None, fields).settings)
    engine.start()
    try:
        with serving(engine, tokenizer, model, **fields) as found:
            yield found
    finally:
        engine.stop(0.0)
