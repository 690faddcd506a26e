"""The official client of OpenAI, as it comes, against the embedded model."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest
import torch
from serving_http import ASKED, DOCUMENT, MODEL, chat

from keepkv.serve.http.run import Background

pytest_plugins = ["serving_http"]
ON = {"ignore_eos": True}


@pytest.fixture(scope="module")
def client(real: Background) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0)


def greedy(loaded: tuple[Any, Any], text: str, most: int) -> str:
    """What transformers' own cache says, up to the token that ends a text, which is a line's end here."""
    model, tokenizer = loaded
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    said = model.generate(**inputs, max_new_tokens=most, do_sample=False)
    return str(tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).removesuffix("\n")


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == MODEL and client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=chat("Why?"))


def test_a_chat_says_what_the_full_cache_says(client: openai.OpenAI, loaded: tuple[Any, Any]) -> None:
    messages = chat(ASKED[0].prompt)
    made = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, temperature=0)
    text = loaded[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    said = made.choices[0].message.content or ""
    assert said == greedy(loaded, text, 12)
    assert made.choices[0].finish_reason == "stop" and made.choices[0].message.role == "assistant"
    usage = made.usage
    assert usage and usage.prompt_tokens == len(loaded[1](text, add_special_tokens=False)["input_ids"])
    assert (usage.completion_tokens, usage.total_tokens) == (3, usage.prompt_tokens + 3)
    cut = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1, temperature=0).choices[0]
    assert cut.finish_reason == "length" and said.startswith(cut.message.content or "?")


def test_a_stream_is_the_same_text_and_ends_with_the_numbers(client: openai.OpenAI) -> None:
    asked: Any = dict(
        model=MODEL, messages=chat(ASKED[0].prompt), max_tokens=20, temperature=0.8, seed=3, extra_body=ON
    )
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason


def test_stop_ends_a_reply_before_it(client: openai.OpenAI) -> None:
    asked: Any = dict(model=MODEL, messages=chat(ASKED[0].prompt), max_tokens=20, temperature=0, extra_body=ON)
    whole = client.chat.completions.create(**asked).choices[0].message.content or ""
    stop = whole[4:6]
    made = client.chat.completions.create(**asked, stop=[stop]).choices[0]
    assert made.message.content == whole[: whole.index(stop)] and made.finish_reason == "stop"


def test_several_replies_have_seeds_of_their_own(client: openai.OpenAI) -> None:
    asked: Any = dict(model=MODEL, messages=chat(ASKED[0].prompt), max_tokens=16, temperature=1.0, extra_body=ON)
    made = client.chat.completions.create(**asked, n=3, seed=5)
    texts = [choice.message.content for choice in made.choices]
    assert [choice.index for choice in made.choices] == [0, 1, 2] and len(set(texts)) > 1
    assert client.chat.completions.create(**asked, seed=6).choices[0].message.content == texts[1]
    assert made.usage and made.usage.completion_tokens <= 48 < made.usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, n=3, seed=5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_logprobs_are_those_of_the_model(client: openai.OpenAI, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    messages = chat(ASKED[0].prompt)
    asked: Any = dict(model=MODEL, messages=messages, max_tokens=6, temperature=0, extra_body=ON)
    made = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    told = made.choices[0].logprobs
    assert told is not None and told.content is not None and len(told.content) == 6
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    reply = tokenizer(made.choices[0].message.content, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids + reply])).logits[0].double().log_softmax(-1)
    for i, (entry, token) in enumerate(zip(told.content, reply, strict=True)):
        row = logits[len(ids) + i - 1]
        assert entry.token == tokenizer.decode([token]) and math.isclose(entry.logprob, row[token], abs_tol=1e-4)
        assert [x.logprob for x in entry.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    streamed = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True)
    pieces = [c.choices[0].logprobs for c in streamed if c.choices[0].logprobs]
    assert [x for one in pieces for x in one.content or []] == told.content


def test_completions_echo_and_score_their_prompt(client: openai.OpenAI, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = tokenizer(DOCUMENT)["input_ids"][:60]
    made = client.completions.create(model=MODEL, prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0)
    told = made.choices[0].logprobs
    assert told is not None and told.token_logprobs and told.top_logprobs and told.tokens and told.text_offset
    assert len(told.token_logprobs) == 61 and told.token_logprobs[0] is None
    with torch.no_grad():
        row = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    expected = [float(row[i, token]) for i, token in enumerate(ids[1:])]
    assert told.token_logprobs[1:60] == pytest.approx(expected, abs=1e-4)
    for i in range(1, 60):
        assert max(told.top_logprobs[i].values()) == pytest.approx(float(row[i - 1].max()), abs=1e-4)
        is_best = told.token_logprobs[i] == max(told.top_logprobs[i].values())
        assert is_best == (int(row[i - 1].argmax()) == ids[i])
    assert made.choices[0].text.startswith(tokenizer.decode(ids))
    ended = tokenizer(DOCUMENT + ASKED[0].prompt + ASKED[0].answer)["input_ids"]  # a reply would be its end of text
    scored = client.completions.create(model=MODEL, prompt=ended, max_tokens=1, echo=True, logprobs=1, temperature=0)
    assert scored.choices[0].logprobs and len(scored.choices[0].logprobs.token_logprobs or ()) == len(ended) + 1
    only = client.completions.create(model=MODEL, prompt=ids, max_tokens=0, echo=True, logprobs=1)
    assert only.choices[0].logprobs and only.choices[0].logprobs.token_logprobs == told.token_logprobs[:60]


def test_completions_of_texts_and_of_token_ids_are_alike(client: openai.OpenAI, loaded: tuple[Any, Any]) -> None:
    texts = ["The code of", "A Python program is"]
    ids = [loaded[1](text)["input_ids"] for text in texts]
    asked: Any = dict(model=MODEL, max_tokens=8, temperature=0)
    one = client.completions.create(**asked, prompt=texts)
    two = client.completions.create(**asked, prompt=ids)
    assert [c.text for c in one.choices] == [c.text for c in two.choices] and len(one.choices) == 2
    chunks = client.completions.create(**asked, prompt=texts, stream=True, echo=True)
    said = ["", ""]
    for chunk in chunks:
        said[chunk.choices[0].index] += chunk.choices[0].text
    assert said == [text + choice.text for text, choice in zip(texts, one.choices, strict=True)]


def receipt_of(made: Any) -> dict[str, Any]:
    found: dict[str, Any] = made.model_extra["keepkv"]["receipt"]
    return found


def test_each_request_has_a_budget_of_its_own_and_its_receipt(client: openai.OpenAI) -> None:
    asked: Any = dict(model=MODEL, messages=chat(ASKED[0].prompt), max_tokens=4, temperature=0)
    sizes = []
    for budget in (0.5, 0.25, 64):
        extra = {"keepkv": {"method": "snapkv", "budget": budget, "receipt": True}}
        told = receipt_of(client.chat.completions.create(**asked, extra_body=extra))
        assert told["compressed"] and told["method"] == "snapkv" and told["budget"] == budget
        sizes.append(told["bytes"])
    assert sizes == sorted(sizes, reverse=True)
    plain = client.chat.completions.create(**asked)
    assert "keepkv" not in (plain.model_extra or {})
    last = list(client.chat.completions.create(**asked, extra_body=extra, stream=True))[-1]
    assert receipt_of(last)["budget"] == 64


def test_protected_spans_are_kept(client: openai.OpenAI) -> None:
    secret = DOCUMENT[100:160]
    extra = {"keepkv": {"method": "streaming-llm", "budget": 0.3, "receipt": True,
                        "spans": [{"text": secret, "mode": "protect", "name": "rule"}]}}  # fmt: skip
    made = client.chat.completions.create(model=MODEL, messages=chat("Why?"), max_tokens=2, extra_body=extra)
    told = receipt_of(made)
    assert told["spans"]["keep_rate"]["rule"] == 1.0 and told["spans"]["keep_rate"]["rest"] < 0.5


def test_a_context_is_read_once_and_asked_many_times(client: openai.OpenAI) -> None:
    made: Any = client.post(
        "/contexts", cast_to=object,
        body={"name": "demo", "text": DOCUMENT, "keepkv": {"method": "many-questions", "budget": 0.5, "receipt": True}},
    )  # fmt: skip
    assert made["bytes"] < made["full_bytes"] and made["keepkv"]["receipt"]["compressed"]
    for one in ASKED:
        reply = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": one.prompt.strip()}], max_tokens=6, temperature=0,
            extra_body={"keepkv": {"context": "demo"}},
        )  # fmt: skip
        assert reply.usage and reply.usage.prompt_tokens_details
        assert reply.usage.prompt_tokens_details.cached_tokens == made["tokens"]
        assert reply.usage.prompt_tokens - made["tokens"] < 30
        assert one.answer.strip() in (reply.choices[0].message.content or "")
    with pytest.raises(openai.ConflictError):
        client.post("/contexts", body={"name": "demo", "text": "other"}, cast_to=object)
    listed: Any = client.get("/contexts", cast_to=object)
    assert [one["name"] for one in listed["data"]] == ["demo"]
    told: Any = client.get("/contexts/demo/tokens", cast_to=object)
    assert "".join(told["tokens"]).endswith(DOCUMENT) and len(told["kept"]) == made["tokens"]
    assert 0 < sum(told["kept"]) / len(told["kept"]) < 0.6
    client.delete("/contexts/demo", cast_to=object)
    with pytest.raises(openai.NotFoundError, match="demo"):
        client.get("/contexts/demo", cast_to=object)


def test_a_context_without_a_budget_is_kept_whole(client: openai.OpenAI) -> None:
    made: Any = client.post("/contexts", body={"name": "whole", "text": DOCUMENT}, cast_to=object)
    assert made["bytes"] >= made["full_bytes"] and made["method"] == "full"
    asked: Any = dict(model=MODEL, max_tokens=6, temperature=0)
    apart = [{"role": "user", "content": f"{DOCUMENT}\n\n{ASKED[0].prompt.strip()}"}]
    whole = client.chat.completions.create(**asked, messages=apart)
    question: Any = [{"role": "user", "content": ASKED[0].prompt.strip()}]
    behind = client.chat.completions.create(**asked, messages=question, extra_body={"keepkv": {"context": "whole"}})
    assert behind.choices[0].message.content == whole.choices[0].message.content
    client.delete("/contexts/whole", cast_to=object)


def test_an_estimate_is_near_what_is_held(client: openai.OpenAI) -> None:
    told = {"method": "snapkv", "budget": 0.25}
    guess: Any = client.post("/estimate", body={"text": DOCUMENT, "keepkv": told}, cast_to=object)
    made: Any = client.post("/contexts", body={"text": DOCUMENT, "keepkv": told}, cast_to=object)
    assert made["bytes"] <= guess["bytes"] < guess["full_bytes"] <= 1.1 * made["full_bytes"]
    client.delete(f"/contexts/{made['name']}", cast_to=object)


def test_health_and_metrics_count(client: openai.OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="The", max_tokens=2)
    text = client.with_options().get("/../metrics", cast_to=str)
    assert "keepkv_time_to_first_token_seconds_count" in text and "keepkv_limit_bytes" in text
    health: Any = client.get("/../health", cast_to=object)
    assert health["status"] == "running" and health["limit"] == 1 << 30
