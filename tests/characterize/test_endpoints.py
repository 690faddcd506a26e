"""Any server that speaks OpenAI's protocol: what is asked of it, and the time of each piece of a reply."""

from __future__ import annotations

import asyncio
import sys
import time

import pytest
from fake_endpoint import Told, served

from keepkv.characterize.drive.base import Timeline
from keepkv.characterize.drive.endpoint import Endpoint
from keepkv.characterize.drive.server import Server, own_command
from keepkv.characterize.grid.levels import Technique
from keepkv.characterize.workload.calls import Call
from keepkv.errors import KeepKVError
from keepkv.tasks.base import Question

CALL = Call(0, 0, "facts", "The key is 7.", Question(" Which key?", " 7"), 5, True)
RECEIPT = {"bytes": 60.0, "full_bytes": 100.0, "seen": [20], "seconds": 0.5}


class Words:
    """A tokenizer whose tokens are words."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * (len(text.split()) + add_special_tokens)


def sent(told: Told, **more) -> Timeline:
    async def act(address: str) -> Timeline:
        one = Endpoint(address, Words(), **more)
        line = Timeline(CALL, time.perf_counter())
        await one.send(line)
        await one.close()
        return line

    with served(told) as address:
        return asyncio.run(act(address))


def test_pieces_come_when_they_come() -> None:
    told = Told(usage={"prompt_tokens": 9, "completion_tokens": 6, "prompt_tokens_details": {"cached_tokens": 4}})
    line = sent(told)
    assert line.error is None and line.text == " a b c" and len(line.times) == 3
    assert line.times[0] - line.arrive >= told.wait
    assert line.times == sorted(line.times) and line.times[-1] - line.arrive >= told.wait + 2 * told.gap
    assert line.end == line.times[-1] and line.admit is None
    assert (line.n_in, line.n_out, line.cached) == (9, 6, 4)
    [asked] = told.asked
    assert asked["path"] == "/v1/completions" and asked["prompt"] == CALL.prompt and asked["model"] == "a-model"
    assert asked["temperature"] == 0 and asked["max_tokens"] == 5 and "keepkv" not in asked


def test_tokens_are_counted_here_where_the_server_does_not() -> None:
    line = sent(Told())
    assert (line.n_in, line.n_out, line.cached) == (7, 3, None)


def test_a_chat_begins_with_its_first_text_and_not_with_its_role() -> None:
    told = Told(wait=0.0, gap=0.05)
    line = sent(told, api="chat")
    assert len(line.times) == 3 and told.asked[0]["messages"] == [{"role": "user", "content": CALL.prompt}]


def test_our_own_server_is_told_the_method_and_sends_its_receipt() -> None:
    told = Told(receipt=RECEIPT)
    line = sent(told, technique=Technique("snapkv", 0.5, {"window": 8, "codec": "int4"}))
    assert told.asked[0]["keepkv"] == {
        "method": "snapkv", "budget": 0.5, "options": {"window": 8}, "codec": "int4", "receipt": True,
        "document": len(CALL.context),
    }  # fmt: skip
    assert line.kv == {"kv_bytes": 60.0, "kv_full": 100.0, "kv_tokens": 20.0, "compress_s": 0.5}
    full = sent(Told(receipt=RECEIPT), technique=Technique())
    assert full.kv["kv_bytes"] == full.kv["kv_full"]


@pytest.mark.parametrize(
    ("told", "said"),
    [(Told(status=429), "429: .*full"), (Told(broken=True), "JSONDecodeError"), (Told(pieces=()), "empty")],
)
def test_what_fails_is_an_error_of_that_request(told: Told, said: str) -> None:
    line = sent(told)
    assert line.error is not None and line.end is None
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(line.error)


def test_a_server_that_is_not_there() -> None:
    async def act() -> Timeline:
        one, line = Endpoint("http://127.0.0.1:9/v1", Words()), Timeline(CALL, 0.0)
        await one.send(line)
        await one.close()
        return line

    assert "ConnectError" in (asyncio.run(act()).error or "")


def test_our_server_is_waited_for_and_ended() -> None:
    script = (
        "import http.server, sys\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers()\n"
        "    def log_message(self, *a): pass\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), H).serve_forever()\n"
    )
    server = Server([sys.executable, "-c", script, "{port}"])
    assert server.process.poll() is None
    server.close()
    assert server.process.poll() is not None
    with pytest.raises(KeepKVError, match="ended with code 3: no model"):
        Server([sys.executable, "-c", "import sys; print('no model'); sys.exit(3)"])
    with pytest.raises(KeepKVError, match="did not answer within"):
        Server([sys.executable, "-c", "import time; time.sleep(60)"], patience=0.3)
    assert own_command("m", "cpu", "float32", 4)[1:5] == ["-m", "keepkv", "serve", "m"]
