"""Servers in this process, on a free port of the loopback address, and what clients ask; as a plugin of pytest, one of
the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from serve_fake import FakeEngine

from keepkv.embedded import CHAT_TEMPLATE, embedded_model
from keepkv.serve.config import read_config
from keepkv.serve.http.run import Background
from keepkv.tasks import demo_document

MODEL = "keepkv-embedded"
DOCUMENT, QUESTIONS = demo_document()
DOCUMENT = DOCUMENT[: DOCUMENT.index(".", 2500) + 2]
ASKED = [one for one in QUESTIONS if one.answer.strip() in DOCUMENT][:2]


def chat(question: str) -> list[Any]:
    """The document, and a question about it behind."""
    return [{"role": "system", "content": DOCUMENT}, {"role": "user", "content": question}]


def running(model: Any, tokenizer: Any, **fields: Any) -> Background:
    """A server of ``model`` by the real engine. fields: of the configuration."""
    return Background(model, tokenizer, read_config(None, {"port": 0, **fields}))


@contextmanager
def faking(tokenizer: Any, delay: float = 0.0, **fields: Any) -> Iterator[Background]:
    """A server of a ``FakeEngine``, which needs no model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keepkv.serve.http.run.Engine", lambda model, tokenizer, settings: FakeEngine(tokenizer, delay))
        server = Background(None, tokenizer, read_config(None, {"port": 0, **fields}))
    with server:
        yield server


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """The embedded model and its tokenizer, as ``keepkv serve`` serves them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = CHAT_TEMPLATE
    return AutoModelForCausalLM.from_pretrained(path).eval(), tokenizer


@pytest.fixture(scope="module")
def real(loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Background]:
    """A server of the embedded model by the real engine."""
    folder = tmp_path_factory.mktemp("contexts")
    with running(*loaded, contexts=folder, memory="1GiB", max_body="1MiB") as found:
        yield found
