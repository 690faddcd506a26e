"""Calls something again and again beside the measurement."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Watch:
    """A thread that calls ``act`` every ``period`` seconds between ``start`` and ``stop``. An error of ``act`` ends it
    and is raised by ``stop``."""

    def __init__(self, act: Callable[[], None], period: float) -> None:
        self.act, self.period = act, period
        self.over = threading.Event()
        self.error: Exception | None = None
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        self.over.clear()
        self.error = None
        self.thread = threading.Thread(target=self._run, name="keepkv-energy", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.over.set()
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        while not self.over.wait(self.period):
            try:
                self.act()
            except Exception as error:
                self.error = error
                return
