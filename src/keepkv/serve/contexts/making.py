"""A context in the making: read, compressed, put on the shelf."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future

from keepkv.engine.cache import Cache
from keepkv.errors import Stopped
from keepkv.serve.batch.reading import Reader
from keepkv.serve.batch.row import receipt_of
from keepkv.serve.contexts.info import ContextInfo
from keepkv.serve.contexts.shelf import Shelf


class Making:
    """A job whose end is a context; ``future`` tells it. check: raises where it cannot be put there any more."""

    def __init__(
        self, name: str, tokens: tuple[int, ...], text: str, *, cache: Cache, reader: Reader, shelf: Shelf, need: int,
        check: Callable[[], None],
    ) -> None:  # fmt: skip
        self.name, self.tokens, self.text, self.need = name, tokens, text, need
        self.future: Future[ContextInfo] = Future()
        self._cache: Cache | None = cache
        self._reader, self._shelf, self._check = reader, shelf, check

    @property
    def cancelled(self) -> bool:
        return self.future.cancelled()

    def held(self) -> Cache | None:
        return self._cache

    def turns(self) -> Iterator[None]:
        assert self._cache is not None
        if not self.future.set_running_or_notify_cancel():
            return
        self._check()
        yield from self._reader.document(self._cache, self.tokens, more=True)
        receipt = receipt_of(self._cache, len(self.tokens))
        self._check()
        info = self._shelf.put(self.name, self._cache, self.tokens, self.text, receipt)
        self._cache = None
        self.future.set_result(info)

    def cancel(self) -> None:
        self.fail(Stopped(f"the server stopped before context {self.name!r} was made"))

    def fail(self, error: Exception) -> None:
        self._cache = None
        if not self.future.cancel():
            self.future.set_exception(error)
