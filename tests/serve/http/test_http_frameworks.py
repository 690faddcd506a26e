"""The chat models of LangChain and LlamaIndex, as they come, beside OpenAI's own client."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import openai
import pytest
from serving_http import ASKED, DOCUMENT, MODEL, chat

from keepkv.serve.http.run import Background

pytest_plugins = ["serving_http"]
pytestmark = pytest.mark.slow
QUESTION = ASKED[0]
MESSAGES = chat(QUESTION.prompt)
HALF = {"keepkv": {"method": "keydiff", "budget": 0.5}}


def said_by_openai(real: Background, **more: Any) -> str:
    client = openai.OpenAI(base_url=f"{real.url}/v1", api_key="none")
    made = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=12, **more)
    return made.choices[0].message.content or ""


@pytest.mark.parametrize("body", [None, HALF], ids=["full", "half"])
def test_langchain(real: Background, body: dict[str, Any] | None) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="pip install langchain-openai")

    def model(name: str, **more: Any) -> Any:
        return langchain.ChatOpenAI(
            model=name, base_url=f"{real.url}/v1", api_key="none", temperature=0, max_tokens=12, max_retries=0,
            extra_body=body, **more,
        )  # fmt: skip

    expected = said_by_openai(real, extra_body=body)
    made = model(MODEL).invoke(MESSAGES)
    assert made.content == expected and expected.strip() == QUESTION.answer.strip()
    assert made.usage_metadata["input_tokens"] > 100 and made.response_metadata["finish_reason"] == "stop"
    pieces = list(model(MODEL, stream_usage=True).stream(MESSAGES))
    assert "".join(piece.content for piece in pieces) == expected and len([x for x in pieces if x.content]) > 1
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) == 3
    assert [x.content for x in model(MODEL).batch([MESSAGES] * 3)] == [expected] * 3
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here"):
        model("gpt").invoke(MESSAGES)
    with pytest.raises(openai.NotFoundError):
        list(model("gpt").stream(MESSAGES))
    with pytest.raises(openai.BadRequestError, match="budget"):
        model(MODEL).bind(extra_body={"keepkv": {"method": "keydiff", "budget": -1}}).invoke(MESSAGES)


@pytest.mark.parametrize("body", [None, HALF], ids=["full", "half"])
def test_llama_index(real: Background, body: dict[str, Any] | None) -> None:
    like = pytest.importorskip("llama_index.llms.openai_like", reason="pip install llama-index-llms-openai-like")
    from llama_index.core.llms import ChatMessage

    def model(name: str, body: Any = body) -> Any:
        return like.OpenAILike(
            model=name, api_base=f"{real.url}/v1", api_key="none", is_chat_model=True, temperature=0, max_tokens=12,
            max_retries=0, additional_kwargs={"extra_body": body},
        )  # fmt: skip

    messages = [ChatMessage(**one) for one in MESSAGES]
    expected = said_by_openai(real, extra_body=body)
    assert model(MODEL).chat(messages).message.content == expected
    pieces = [piece.delta for piece in model(MODEL).stream_chat(messages)]
    assert "".join(x or "" for x in pieces) == expected and len([x for x in pieces if x]) > 1
    with pytest.raises(openai.BadRequestError, match="nothing stands before the question") if body else nullcontext():
        assert model(MODEL).complete(DOCUMENT + QUESTION.prompt).text.strip() == QUESTION.answer.strip()
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here"):
        model("gpt").chat(messages)
    with pytest.raises(openai.BadRequestError, match="budget"):
        model(MODEL, {"keepkv": {"method": "keydiff", "budget": -1}}).chat(messages)
