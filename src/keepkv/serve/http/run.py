"""A server from its configuration to its end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from keepkv.core.budget import Budget
from keepkv.core.words import size
from keepkv.errors import KeepKVError
from keepkv.serve.config import Config
from keepkv.serve.engine import Engine
from keepkv.serve.http.app import application, front_of
from keepkv.serve.http.front import Front

TICK = 0.05  # seconds


# Seconds that a connection may idle: more than after which clients let go of one (5 in httpx, 60 in proxies), or else
# a request goes out on a connection that is being closed.
IDLE = 75


class Server(uvicorn.Server):
    """uvicorn, which at SIGTERM first answers on until what runs has ended, and refuses what is new.

    A second signal ends it at once. ready: is called with the URL when it listens.
    """

    def __init__(self, front: Front, ready: Callable[[str], None], log: str = "warning") -> None:
        config = uvicorn.Config(
            application(front), host=front.config.host, port=front.config.port, log_level=log, access_log=False,
            server_header=False, timeout_graceful_shutdown=2, lifespan="off", timeout_keep_alive=IDLE,
        )  # fmt: skip
        super().__init__(config)
        self.front, self._ready = front, ready

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first lets what runs go on."""
        if self.front.stopping:
            super().handle_exit(sig, frame)
        self.front.stopping = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets=sockets)
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
            self._ready(f"http://{host}:{port}")

    async def main_loop(self) -> None:
        """Serve until told to stop, then until what runs has ended or ``grace`` is over."""
        while not (self.front.stopping or self.should_exit):
            await self._tick()
        loop, left = asyncio.get_running_loop(), self.front.config.grace
        until = loop.time() + left
        while not self.should_exit and loop.time() < until and self._busy():
            await self._tick()
        with contextlib.suppress(asyncio.TimeoutError):  # rows that are left are cancelled, and their clients told
            await asyncio.wait_for(loop.run_in_executor(None, self.front.engine.stop, 0.0), 10)

    async def _tick(self) -> None:
        await self.on_tick(0)
        await asyncio.sleep(TICK)

    def _busy(self) -> bool:
        now = self.front.engine.stats()
        return bool(now.rows or now.reading or now.waiting)


def serve(model: Any, tokenizer: Any, config: Config, say: Callable[[str], None]) -> None:
    """Serve ``model``, of transformers, until a signal ends it. say: gets the line for people when it listens.

    Raises ``KeepKVError`` where the configuration, the model or the address will not do.
    """
    engine = Engine(model, tokenizer, config.settings)
    engine.start()
    try:
        front = front_of(engine, tokenizer, config)
        Server(front, lambda url: say(line(front, url))).run()
    except SystemExit:  # what uvicorn makes of an address that is taken, which it logs
        raise KeepKVError(f"cannot listen on {config.host}:{config.port}; --port takes another") from None
    finally:
        engine.stop(0.0)


class Background:
    """A server of ``model`` in a thread of this process, for notebooks, measurements and tests; ``with`` closes it.

    config: the default one on a free port if absent. url: where it listens. front: what its paths share.
    """

    def __init__(self, model: Any, tokenizer: Any, config: Config | None = None) -> None:
        config = config or Config(port=0)
        self.engine = Engine(model, tokenizer, config.settings)
        self.engine.start()
        self.front = front_of(self.engine, tokenizer, config)
        listening = threading.Event()
        self.url = ""

        def ready(url: str) -> None:
            self.url = url
            listening.set()

        self._server = Server(self.front, ready)
        self._thread = threading.Thread(target=self._server.run, name="keepkv serve", daemon=True)
        self._thread.start()
        while not listening.wait(0.05):
            if not self._thread.is_alive():
                self.engine.stop(0.0)
                raise KeepKVError(f"cannot listen on {config.host}:{config.port}: take another port, or 0")

    def close(self) -> None:
        """End what runs, and the server."""
        self._server.should_exit = True
        self._thread.join()
        self.engine.stop(0.0)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def line(front: Front, url: str) -> str:
    """What is served, in one line."""
    config = front.config
    how = "no compression unless a request asks for it"
    if config.budget is not None:
        how = f"{Budget.of(config.budget)} by {config.method or 'many-questions'}, unless a request says otherwise"
    memory = size(front.engine.stats().limit)
    return f"{url} serves {config.served}: {how}; caches take at most {memory}. Ctrl-C ends it."
