"""What clients must not send: each is refused with a 4xx, none breaks the server, and the next request is fine."""

from __future__ import annotations

import http.client
import json
import math
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keepkv.serve.http.run import Background

pytest_plugins = ["serving_http"]
FINE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [
            {"role": "system", "content": "The code of amber falcon is 4821. " * 3},
            {"role": "user", "content": "Why?"},
        ],
        "max_tokens": 1,
    },
    "/v1/completions": {"prompt": "The code of amber falcon is", "max_tokens": 1},
    "/v1/contexts": {"text": "The code of amber falcon is 4821. ", "name": "fine"},
    "/v1/estimate": {"text": "The code of amber falcon is 4821. "},
}
HUGE = st.integers(min_value=2**31) | st.integers(max_value=-1) | st.just(10**400)
NO_NUMBER = st.text(max_size=5) | st.booleans() | st.just([]) | st.just({}) | st.just([1])
ODD = st.sampled_from([math.nan, math.inf, -math.inf, -0.5, 1e300])
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8,
)  # fmt: skip
NO_TEXT = st.integers() | st.booleans() | st.just([1.5]) | st.just({"a": 1}) | st.just([[]]) | st.just([{}])
FAR = st.integers(500, 2**31 - 1)
SPAN = st.fixed_dictionaries({"start": FAR, "end": FAR}) | st.sampled_from(
    [{}, {"start": 1}, {"start": 3, "end": 3}, {"start": 0, "end": 4, "mode": "keep"}, {"text": ""},
     {"text": "nowhere"}, {"start": 0, "end": 4, "weight": -1}, {"start": 0, "end": 4, "min_keep": 9},
     {"role": "nobody"}, {"start": -1, "end": 4}, {"start": 0, "end": 4, "text": "The"},
     {"start": 0, "end": 4, "weight": math.nan}, 7, "0:4", None]
)  # fmt: skip
BUDGET = (
    st.sampled_from(
        [0, -1, 0.0, -0.5, 1.5, math.nan, math.inf, True, [], {}, "", "lots", "0%", "-5MiB", "5 parsecs", "nan", 2**40]
    )
    | st.floats(max_value=0, allow_nan=False)
    | st.floats(min_value=1.0001)
)
KEEPKV = {  # no value here is one that any request may have
    "budget": BUDGET,
    "method": st.sampled_from(["", "no-such-method", 5, [], {}, True, "snapkv:window=4"]),
    "options": st.sampled_from(
        [5, [], "x", {"no_such": 1}, {"calibration": "/etc/passwd"}, {"window": {}}, {"window": math.nan}]
    ),
    "spans": st.lists(SPAN, min_size=1, max_size=3) | st.sampled_from([5, "x", {}, [[]]]),
    "context": st.sampled_from([5, "", "missing", [], "../../etc/passwd", "a\x00b"]),
    "every": HUGE | NO_NUMBER | ODD | st.just(0),
    "codec": st.sampled_from(["", "no-such-codec", 4, []]),
    "receipt": st.sampled_from([1, "yes", [], 0.5]),
    "compress_question": st.sampled_from([1, "yes", [], 0.5]),
    "document": HUGE | NO_NUMBER | ODD,
    "spams": ANY,
}
FIELDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "/v1/chat/completions": {
        "messages": NO_TEXT | st.just([]) | st.just([{"role": "user"}]) | st.just([{"role": "owner", "content": "a"}])
        | st.just([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
        | st.text(max_size=5),
        "top_logprobs": HUGE | NO_NUMBER | st.just(21),
        "logprobs": st.sampled_from([5, "yes", []]),
        "max_completion_tokens": HUGE | NO_NUMBER | ODD | st.just(0),
    },
    "/v1/completions": {
        "prompt": st.sampled_from(
            [5, None, [], {}, [[]], [1, "a"], [-1], [2**31], [99_999], [1.5], [[1], "a"], ["a"] * 100]
        ),
        "logprobs": HUGE | st.text(max_size=5) | ODD | st.just(21),
        "echo": st.sampled_from([5, "yes", []]),
    },
    "/v1/contexts": {
        "name": st.sampled_from(["", "..", "../x", "a/b", "a" * 101, 5, [], "a\x00", "ä"]),
        "text": st.sampled_from(["", 5, [], {}]), "messages": NO_TEXT, "replace": st.sampled_from([1, "yes"]),
    },
    "/v1/estimate": {"text": st.sampled_from([5, [], {}]), "tokens": HUGE | NO_NUMBER | st.just(0)},
}  # fmt: skip
GENERATION: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["gpt", 5, [], ""]),
    "max_tokens": HUGE | NO_NUMBER | ODD,
    "temperature": NO_NUMBER | ODD | st.just(2.5) | st.just(10**400),
    "top_p": NO_NUMBER | ODD | st.just(0) | st.just(1.5),
    "n": HUGE | NO_NUMBER | ODD | st.sampled_from([0, 9, 128]),
    "seed": st.just(2**64) | NO_NUMBER | ODD,
    "stop": st.sampled_from([5, {}, [5], ["a"] * 17, "", [""], True]),
    "stream": st.sampled_from([5, "yes", []]),
    "stream_options": st.sampled_from([5, "yes", [], {"include": True}]),
    "top_k": ANY, "tools": st.sampled_from([5, [{}], "x"]), "frequency_penalty": st.sampled_from([1, -0.5, "x"]),
    "logit_bias": st.just({"5": 1}), "response_format": st.just({"type": "json_object"}),
}  # fmt: skip


@st.composite
def misfits(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path, and a body that is wrong in one place; a body that is cut off; one that is no object."""
    path = draw(st.sampled_from(sorted(FINE)))
    body = json.loads(json.dumps(FINE[path]))
    kind = draw(st.integers(0, 9))
    if kind == 0:
        text = json.dumps(body)
        return path, text[: draw(st.integers(0, len(text) - 1))].encode()
    if kind == 1:
        return path, draw(
            st.sampled_from([b"[]", b"5", b'"a"', b"null", b"\xff\xfe{", b"[" * 5000, b'{"a":' * 3000, b"1" * 5000])
        )
    fields = FIELDS[path] | (GENERATION if "completions" in path else {})
    if kind < 6:
        field = draw(st.sampled_from(sorted(KEEPKV)))
        if path == "/v1/estimate" and field == "spans":
            field = "budget"
        body["keepkv"] = {"budget": 0.5, field: draw(KEEPKV[field])}
    else:
        field = draw(st.sampled_from(sorted(fields)))
        body[field] = draw(fields[field])
    return path, json.dumps(body).encode()


def nobody_is_left(real: Background) -> None:
    """A client has its answer a moment before the engine has forgotten it."""
    end = time.monotonic() + 60
    while (now := real.engine.stats()).rows + now.reading + now.waiting and time.monotonic() < end:
        time.sleep(0.05)
    assert (now.rows, now.reading, now.waiting) == (0, 0, 0)


@pytest.fixture(scope="module")
def web(real: Background) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


def refused(web: httpx.Client, case: tuple[str, bytes], count: list[int]) -> None:
    path, body = case
    answer = web.post(path, content=body, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500, (path, body[:500], answer.status_code, answer.text[:500])
    told = answer.json()["error"]
    assert told["message"] and set(told) == {"message", "type", "param", "code"}
    count[0] += 1
    if count[0] % 50 == 0:
        fine = web.post("/v1/chat/completions", json=FINE["/v1/chat/completions"])
        assert fine.status_code == 200, fine.text


KEEP = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]


def test_hundreds_of_malformed_requests(web: httpx.Client) -> None:
    count = [0]

    @settings(max_examples=400, deadline=None, suppress_health_check=KEEP)
    @given(misfits())
    def all_of_them(case: tuple[str, bytes]) -> None:
        refused(web, case, count)

    all_of_them()
    assert web.post("/v1/chat/completions", json=FINE["/v1/chat/completions"]).status_code == 200


@pytest.mark.slow
def test_ten_thousand_malformed_requests(web: httpx.Client, real: Background) -> None:
    count = [0]

    @settings(max_examples=10_000, deadline=None, suppress_health_check=KEEP)
    @given(misfits())
    def all_of_them(case: tuple[str, bytes]) -> None:
        refused(web, case, count)

    all_of_them()
    assert count[0] >= 10_000
    nobody_is_left(real)


def test_half_closed_and_cut_off_connections(web: httpx.Client, real: Background) -> None:
    there = urlsplit(real.url)
    body = json.dumps({**FINE["/v1/chat/completions"], "max_tokens": 200, "stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    whole = head + b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
    for end in (5, len(head), len(head) + 30, len(whole) - 5, len(whole)):
        for shut in (None, socket.SHUT_WR, socket.SHUT_RDWR):
            with socket.create_connection((there.hostname, there.port)) as connection:
                connection.sendall(whole[:end])
                if shut is not None:
                    connection.shutdown(shut)
        assert web.get("/health").status_code == 200
    for garbage in (
        b"\x00\xff" * 500,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    ):
        with socket.create_connection((there.hostname, there.port)) as connection:
            connection.sendall(garbage)
    nobody_is_left(real)
    assert web.post("/v1/chat/completions", json=FINE["/v1/chat/completions"]).status_code == 200


@pytest.mark.slow
def test_a_connection_may_idle_for_longer_than_clients_let_it(real: Background) -> None:
    """httpx lets go of one after 5 seconds: a server that closes it then loses what is just being sent."""
    there = urlsplit(real.url)
    connection = http.client.HTTPConnection(there.hostname or "", there.port)
    connection.connect()
    before = connection.sock
    for pause in (0, 7):
        time.sleep(pause)
        connection.request("GET", "/health")
        assert connection.getresponse().read() and connection.sock is before
    connection.close()
