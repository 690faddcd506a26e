"""What the front does with what an engine raises and tells, and with clients that go away; the engine obeys tests."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from serving_http import faking
from transformers import AutoTokenizer

from keepkv.embedded import CHAT_TEMPLATE, embedded_model
from keepkv.errors import Busy, ContextMissing, KeepKVError, Stopped, TooLarge
from keepkv.serve.http.front import Front
from keepkv.serve.request import Failed

ASKED: dict[str, Any] = {"model": "keepkv-embedded", "messages": [{"role": "user", "content": "a b c d e f"}]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = AutoTokenizer.from_pretrained(embedded_model())
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture
def faked(tokenizer: Any) -> Iterator[tuple[str, Any, Front]]:
    with faking(tokenizer, max_body=200_000, grace=5) as server:
        yield server.url, server.engine, server.front


def client(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, **options)


def soon(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not holds():
        time.sleep(0.02)
    return holds()


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (TooLarge("9 of 8", 9, 8), 400),
        (Busy("64 wait", 64, 64), 429),
        (Stopped("stopping"), 503),
        (ContextMissing("no context 'x'"), 404),
        (KeepKVError("as it is, it cannot be"), 400),
    ],
)
def test_what_the_engine_refuses_has_its_status(faked: Any, raised: KeepKVError, status: int) -> None:
    url, engine, _ = faked
    engine.refuse = raised
    with pytest.raises(openai.APIStatusError) as caught:
        client(url).chat.completions.create(**ASKED)
    assert caught.value.status_code == status and str(raised) in caught.value.message
    body = caught.value.body
    assert isinstance(body, dict) and set(body) == {"message", "type", "param", "code"}
    assert ("retry-after" in caught.value.response.headers) == (status == 429)
    engine.refuse = None
    assert client(url).chat.completions.create(**ASKED, max_tokens=2).choices[0].finish_reason == "length"


@pytest.mark.parametrize(("refused", "status"), [(True, 400), (False, 500)])
def test_a_reply_that_fails_is_told_and_so_are_those_in_a_stream(faked: Any, refused: bool, status: int) -> None:
    url, engine, _ = faked
    engine.fail = Failed("row 3 went wrong", refused)
    with pytest.raises(openai.APIStatusError) as caught:
        client(url).chat.completions.create(**ASKED, max_tokens=5)
    assert caught.value.status_code == status
    said = []
    with pytest.raises(openai.APIError, match="row 3 went wrong"):
        for chunk in client(url).chat.completions.create(**ASKED, max_tokens=5, stream=True):
            said.append(chunk.choices[0].delta.content)
    assert len(said) == 3  # the role, and two tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_rows(faked: Any, stream: bool) -> None:
    url, engine, _ = faked
    engine.delay = 0.05
    there = urlsplit(url)
    connection = http.client.HTTPConnection(there.hostname or "", there.port)
    body = json.dumps({**ASKED, "max_tokens": 1000, "stream": stream, "n": 3})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    assert soon(lambda: engine.running == 3)
    if stream:
        connection.getresponse().read(10)
    connection.close()
    assert soon(lambda: engine.running == 0)


def test_bodies_are_refused_while_they_are_read(faked: Any) -> None:
    """A hundred megabytes that are announced, and as many that are not."""
    url, engine, _ = faked
    there = urlsplit(url)
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1600):
            sent += 1 << 16
            yield b" " * (1 << 16)

    for headers in ({"Content-Length": str(1600 << 16)}, {"Transfer-Encoding": "chunked"}):
        connection = http.client.HTTPConnection(there.hostname or "", there.port, timeout=60)
        connection.request(
            "POST", "/v1/chat/completions", pieces(), {"Content-Type": "application/json", **headers},
            encode_chunked="Transfer-Encoding" in headers,
        )  # fmt: skip
        answer = connection.getresponse()
        assert answer.status == 413 and "200,000" in json.loads(answer.read())["error"]["message"]
        connection.close()
    assert not engine.seen
    assert client(url).models.list().data[0].id == "keepkv-embedded"


def test_a_body_that_never_comes_does_not_hold_others(faked: Any) -> None:
    url, _, _ = faked
    there = urlsplit(url)
    half = []
    for shut in (True, False):
        connection = socket.create_connection((there.hostname, there.port))
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        connection.sendall(b'Content-Length: 500\r\n\r\n{"prompt": "')
        if shut:
            connection.shutdown(socket.SHUT_WR)
        half.append(connection)
    assert client(url).completions.create(model="keepkv-embedded", prompt="a", max_tokens=1).choices
    for connection in half:
        connection.close()


def test_who_sends_nothing_for_too_long_is_told(faked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepkv.serve.http.door.PATIENCE", 0.2)
    monkeypatch.setattr("keepkv.serve.http.door.PAUSE", 0.1)
    there = urlsplit(faked[0])
    with socket.create_connection((there.hostname, there.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        connection.sendall(b'Content-Length: 500\r\n\r\n{"prompt": "')
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_server_that_stops_says_so_and_ends_what_runs(faked: Any) -> None:
    url, engine, front = faked
    engine.delay = 0.02
    chunks = client(url).chat.completions.create(**ASKED, max_tokens=50, stream=True)
    first = next(chunks)
    front.stopping = True
    with pytest.raises(openai.InternalServerError) as caught:
        client(url).chat.completions.create(**ASKED)
    assert caught.value.status_code == 503
    rest = list(chunks)
    assert first.choices and rest[-1].choices[0].finish_reason == "length"  # what runs has its time
    assert soon(lambda: engine.stopped)


def test_what_does_not_end_in_time_is_cancelled_and_told(tokenizer: Any) -> None:
    with faking(tokenizer, delay=0.05, grace=0.2) as server:
        chunks = client(server.url).chat.completions.create(**ASKED, max_tokens=10_000, stream=True)
        next(chunks)
        server.front.stopping = True
        with pytest.raises(openai.APIError, match="stopped before the reply ended"):
            list(chunks)


def test_a_key_a_host_and_a_kind_of_body(tokenizer: Any) -> None:
    with faking(tokenizer, api_key="right") as server:
        url = server.url
        with pytest.raises(openai.AuthenticationError):
            client(url).models.list()
        good = openai.OpenAI(base_url=f"{url}/v1", api_key="right", max_retries=0)
        assert good.models.list().data
        there = urlsplit(url)
        for path, headers, status in (
            ("/", {}, 200),
            ("/health", {}, 200),
            ("/metrics", {}, 401),
            ("/metrics", {"Authorization": "Bearer right"}, 200),
            ("/health", {"Host": "evil.example"}, 400),
        ):
            connection = http.client.HTTPConnection(there.hostname or "", there.port)
            connection.request("GET", path, headers=headers)
            assert connection.getresponse().status == status, (path, headers)
            connection.close()
        connection = http.client.HTTPConnection(there.hostname or "", there.port)
        plain = {"Authorization": "Bearer right", "Content-Type": "text/plain"}
        connection.request("POST", "/v1/completions", '{"prompt": "a"}', plain)
        assert connection.getresponse().status == 415
        connection.close()


def test_prompts_are_asked_for_as_they_were_meant(faked: Any) -> None:
    """What reaches the engine: the document and its question, sampling, seeds of several replies."""
    url, engine, _ = faked
    client(url).chat.completions.create(
        model="keepkv-embedded",
        messages=[{"role": "system", "content": "The document. "}, {"role": "user", "content": "Why?"}],
        n=2, seed=7, stop=["X"], max_completion_tokens=3, temperature=0.5, top_p=0.25, logprobs=True, top_logprobs=2,
        extra_body={"keepkv": {"method": "snapkv", "budget": 0.5, "options": {"window": 4}, "receipt": True}},
    )  # fmt: skip
    first, second = engine.seen
    assert engine.tokenizer.decode(first.tokens[: first.split]).endswith("The document. ")
    assert engine.tokenizer.decode(first.tokens[first.split :]) == "Why?"
    sampling = first.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.stop) == (3, 0.5, 0.25, ("X",))
    assert (sampling.seed, second.sampling.seed, sampling.logprobs, first.receipt) == (7, 8, 2, True)
    assert first.compression.method == "snapkv" and dict(first.compression.options) == {"window": 4}
    extra = {"keepkv": {"compress_question": True, "budget": 0.5}}
    client(url).chat.completions.create(**ASKED, max_tokens=1, extra_body=extra)
    assert engine.seen[-1].split is None
    client(url).completions.create(
        model="keepkv-embedded", prompt=[5, 6, 7, 8], max_tokens=1, extra_body={"keepkv": {"document": 3, "budget": 2}}
    )
    assert (engine.seen[-1].tokens, engine.seen[-1].split) == ((5, 6, 7, 8), 3)


@pytest.mark.parametrize(
    ("path", "more", "said"),
    [
        ("chat/completions", {"keepkv": {"budget": 0.5}}, "nothing stands before the question"),
        ("chat/completions", {"keepkv": {"document": 3}}, "document"),
        ("chat/completions", {"keepkv": {"context": "x", "budget": 0.5}}, "was compressed when it was made"),
        ("chat/completions", {"keepkv": {"contxt": "x"}}, "keepkv.contxt"),
        ("chat/completions", {"keepkv": {"context": "x"}}, "no context 'x'"),
        ("chat/completions", {"tools": [{}]}, "tools is not served here"),
        ("chat/completions", {"frequency_penalty": 0.5}, "frequency_penalty is not served here"),
        ("chat/completions", {"top_k": 5}, "top_k"),
        ("chat/completions", {"n": 9}, "at most 8"),
        ("chat/completions", {"top_logprobs": 3}, "needs logprobs"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [99999]}, "token 99999"),
        ("completions", {"prompt": "abc", "keepkv": {"document": 4}}, "the prompt has 3 characters"),
        ("completions", {"prompt": [5, 6], "keepkv": {"document": 0, "budget": 0.5}}, "nothing is there to compress"),
        ("completions", {"prompt": "abc", "echo": True, "logprobs": 1, "keepkv": {"budget": 0.5}}, "keepkv.document"),
        ("completions", {"prompt": ["a"] * 9}, "at most 8"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_remedy(
    faked: Any, path: str, more: dict[str, Any], said: str
) -> None:
    url, engine, _ = faked
    body = {**({"messages": ASKED["messages"]} if path.startswith("chat") else {}), **more}
    with pytest.raises(openai.APIStatusError, match=said) as caught:
        client(url).post(f"/{path}", body=body, cast_to=object)
    assert caught.value.status_code in (400, 404) and not engine.seen
