"""A small server that speaks OpenAI's protocol and answers what it is told to, at known times."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Told:
    """What the server does. pieces: of a reply, ``gap`` seconds apart, the first after ``wait``. usage, receipt: sent
    with the end where given. status: of every answer. broken: ends in the middle of a reply. asked: what came."""

    pieces: tuple[str, ...] = (" a", " b", " c")
    wait: float = 0.05
    gap: float = 0.02
    usage: dict[str, Any] | None = None
    receipt: dict[str, Any] | None = None
    status: int = 200
    broken: bool = False
    asked: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def served(told: Told) -> Iterator[str]:
    """The address of a server on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *said: Any) -> None:
            """Nothing is printed."""

        def do_GET(self) -> None:
            self._begin("application/json")
            self.wfile.write(json.dumps({"data": [{"id": "a-model"}]}).encode())

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.asked.append({"path": self.path, **asked})
            if told.status != 200:
                self._begin("application/json", told.status)
                self.wfile.write(b'{"error": {"message": "full"}}')
                return
            self._begin("text/event-stream")
            time.sleep(told.wait)
            chat = "chat" in self.path
            if chat:
                self._send({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            for i, piece in enumerate(told.pieces):
                time.sleep(told.gap if i else 0.0)
                if told.broken and i:
                    self.wfile.write(b"data: {broken\n\n")
                    return
                self._send({"choices": [{"delta": {"content": piece}} if chat else {"text": piece}]})
            end: dict[str, Any] = {"choices": []}
            end |= {"usage": told.usage} if told.usage else {}
            end |= {"keepkv": {"receipt": told.receipt}} if told.receipt else {}
            self._send(end)
            self.wfile.write(b"data: [DONE]\n\n")

        def _begin(self, kind: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()

        def _send(self, chunk: dict[str, Any]) -> None:
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.flush()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
