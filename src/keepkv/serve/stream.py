"""What a caller holds of a request: its events, as they come."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

from keepkv.serve.request import Event, Failed, Finished

LOG = logging.getLogger("keepkv.serve")


class Stream:
    """Events of one request, in their order; iterating ends behind ``Finished`` or ``Failed``.

    listen: is called with each event by the thread that runs the model, and must return at once, as
    ``loop.call_soon_threadsafe`` does; events then come to it and not to whoever iterates.
    """

    def __init__(self, listen: Callable[[Event], object] | None = None) -> None:
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._put: Callable[[Event], object] = self._events.put if listen is None else listen
        self._cancelled = threading.Event()

    def put(self, event: Event) -> None:
        """Tell an event; for the engine. A listener that fails hears no more, and its reply is cancelled."""
        try:
            self._put(event)
        except Exception:
            LOG.exception("a listener failed, as where its client is gone: its reply is cancelled")
            self._put = _nobody
            self.cancel()

    def cancel(self) -> None:
        """Ask the engine to end the reply: before its next token, it frees the row and says ``Finished("cancelled")``.
        Does nothing where it has ended."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._cancelled.is_set()

    def get(self, timeout: float | None = None) -> Event:
        """The next event; raises ``TimeoutError`` where none came for ``timeout`` seconds."""
        try:
            return self._events.get(timeout=timeout)
        except Empty:
            raise TimeoutError(f"no event of this request in {timeout} s") from None

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self.get()
            yield event
            if isinstance(event, (Finished, Failed)):
                return


def _nobody(event: Event) -> None:
    """Hears nothing."""
