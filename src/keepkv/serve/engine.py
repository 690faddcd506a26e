"""The engine: one model, one worker thread, many requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any

from keepkv.core.budget import Budget
from keepkv.engine.cache import Cache
from keepkv.errors import KeepKVError, Stopped, TooLarge, UnsupportedInput
from keepkv.methods import METHODS, PRESETS
from keepkv.serve.admission import Sizes, check_ever, free_memory
from keepkv.serve.batch.decode import Decoder
from keepkv.serve.batch.reading import Reader
from keepkv.serve.batch.row import Row
from keepkv.serve.caches import empty_cache
from keepkv.serve.contexts.files import Folder
from keepkv.serve.contexts.info import ContextInfo
from keepkv.serve.contexts.making import Making
from keepkv.serve.contexts.shelf import Shelf
from keepkv.serve.request import Compression, Event, Request
from keepkv.serve.settings import Settings
from keepkv.serve.stats import Stats
from keepkv.serve.stream import Stream
from keepkv.serve.worker import Worker
from keepkv.tasks.length import positions_of


class Engine:
    """Serves ``model``, of transformers, with its ``tokenizer``, as ``settings`` allow. Any thread may call any method
    of it."""

    def __init__(self, model: Any, tokenizer: Any, settings: Settings | None = None) -> None:
        self.model, self.tokenizer, self.settings = model.eval(), tokenizer, settings or Settings()
        self.contexts = Contexts(self)
        self.refused = Counter[str]()
        self._worker: Worker | None = None
        self._folder: Folder | None = None

    def start(self) -> None:
        """Measure the model, open the folder of contexts and start the worker. Raises ``UnsupportedModel`` where the
        model cannot be served, ``KeepKVError`` where the folder cannot be used."""
        if self._worker is not None:
            raise Stopped("an engine is started once: make another")
        settings = self.settings
        self._kept = Cache(self.model, "full")  # keeps the model on keepkv's attention as long as it is served
        decoder = Decoder(self.model, settings.rows, settings.exact, settings.threads)
        self.sizes = Sizes.measured(self.model, settings.chunk, positions_of(self.model))
        self.ends = _ends(self.model, self.tokenizer)
        self._folder = None if settings.contexts is None else Folder(settings.contexts, self.model)
        self.shelf = Shelf(self._folder, settings.context_bytes, settings.context_disk)
        memory = settings.memory or free_memory([self.model.device]) // 2
        self._worker = Worker(decoder, self.shelf, memory=memory, rows=settings.rows, queue=settings.queue)
        self._worker.start()

    def stop(self, grace: float = 10.0) -> None:
        """Take nothing new, wait ``grace`` seconds for what was taken, then cancel it, and end the worker."""
        if self._worker is not None:
            self._worker.stop(grace)
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    @cached_property
    def limit_tokens(self) -> int:
        """The most tokens of a prompt and its reply together."""
        return positions_of(self.model) or 1 << 31

    def methods(self) -> tuple[str, ...]:
        """Methods and presets that requests may name."""
        return self._methods

    def submit(self, request: Request, listen: Callable[[Event], object] | None = None) -> Stream:
        """Ask for a reply; ``listen`` as of ``Stream``.

        Raises at once ``TooLarge`` where the request is more than this server can ever hold, ``Busy`` where as many
        wait as may, ``ContextMissing``, ``Stopped``, and another ``KeepKVError`` where it cannot be served as it is.
        """
        try:
            stream = Stream(listen)
            self.worker.add(self._row(request, stream))
            return stream
        except KeepKVError as error:
            self.refused[type(error).__name__] += 1
            raise

    def estimate(self, tokens: int, compression: Compression | None = None) -> tuple[int, int, int]:
        """Bytes of a document of ``tokens``: compressed, of a plain cache, and at the peak of reading it."""
        cache = empty_cache(self.model, compression, self.settings, tokens, document=True)
        sizes = self.sizes
        return sizes.kept(cache, tokens), sizes.whole(tokens), sizes.peak(cache, tokens)

    def stats(self) -> Stats:
        """How the engine is now, and what it has done."""
        worker, (inside, memory, disk) = self.worker, self.shelf.held
        counts = worker.counts
        return Stats(
            state=worker.state, rows=len(worker.decoding), reading=len(worker.reading), waiting=len(worker.waiting),
            widths=worker.decoder.widths, threads=worker.decoder.threads, bytes=worker.measured,
            reserved=worker.ledger.reserved, limit=worker.ledger.limit, contexts=len(self.shelf.infos()),
            contexts_in_memory=inside, context_bytes=memory, context_disk=disk, finished=dict(worker.finished),
            refused=dict(self.refused),
            prompt_tokens=counts["prompt"], cached_tokens=counts["cached"], completion_tokens=counts["completion"],
            steps=counts["steps"], decoded=counts["decoded"], seconds=dict(worker.seconds),
        )  # fmt: skip

    @property
    def worker(self) -> Worker:
        """Raises ``Stopped`` before ``start``."""
        if self._worker is None:
            raise Stopped("the engine has not been started")
        return self._worker

    # --- what becomes of a request -----------------------------------------------------------------------------------

    def _row(self, request: Request, stream: Stream) -> Row:
        tokens, sampling, sizes = self.checked(request.tokens), request.sampling, self.sizes
        split, model, before = request.split, self.model, tuple[int, ...]()
        if request.context is not None:
            if request.compression is not None or split is not None:
                raise KeepKVError(
                    f"context {request.context!r} was compressed when it was made: ask with it for no compression and "
                    "no split, or give the document in the request"
                )
            before = self.shelf.facts(request.context).tokens
        if split is not None and not 0 < split < len(tokens):
            raise KeepKVError(f"split={split}: the document and what follows it need a token each, of {len(tokens)}")
        self._check_length(len(before) + len(tokens), sampling.max_tokens)
        asked, limit = request.compression, self.worker.ledger.limit
        if request.context is not None:
            name, facts = request.context, self.shelf.facts(request.context)
            cache = self._kept
            need = facts.bytes + sizes.behind(cache, facts.bytes, len(tokens) + sampling.max_tokens)

            def open() -> Cache:
                return self.shelf.cache(name).copy()
        else:
            document = len(tokens) if split is None else split
            cache = empty_cache(model, asked, self.settings, document, document=split is not None)
            rest = len(tokens) - document + sampling.max_tokens
            kept = sizes.kept(cache, document)
            need = max(sizes.peak(cache, document), sizes.behind(cache, kept, rest))
            open = cache_of(cache)
        check_ever(need, limit, f"a prompt of {len(before) + len(tokens):,} tokens")
        reader = Reader(model, self.settings.chunk, sampling.prompt_logprobs)
        return Row(
            request, stream, open=open, before=before, tokenizer=self.tokenizer, reader=reader, ends=self.ends,
            need=need, growth=sizes.reply(cache, sampling.max_tokens), ended=self._ended,
        )  # fmt: skip

    def _ended(self, row: Row, how: str) -> None:
        worker = self.worker
        worker.finished[how] += 1
        worker.counts["prompt"] += row.cached + len(row.request.tokens)
        worker.counts["cached"] += row.cached
        worker.counts["completion"] += row.said

    def checked(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """``tokens`` of a prompt. Raises ``UnsupportedInput`` where the model does not know one, or there is none."""
        most = self.model.get_input_embeddings().num_embeddings
        if not tokens or not all(isinstance(x, int) and 0 <= x < most for x in tokens):
            raise UnsupportedInput(f"a prompt is one token at least, each from 0 to {most - 1}")
        return tuple(tokens)

    def _check_length(self, prompt: int, reply: int) -> None:
        """Raise ``TooLarge`` where the model or the settings read or write fewer."""
        settings, model = self.settings, self.limit_tokens
        for what, given, limit in (
            ("prompt", prompt, settings.prompt), ("reply", reply, settings.reply),
            ("prompt and reply", prompt + reply, model),
        ):  # fmt: skip
            if limit is not None and given > limit:
                raise TooLarge(f"{given:,} tokens of {what}, and here {limit:,} are the most", given, limit)

    @cached_property
    def _methods(self) -> tuple[str, ...]:
        allowed = self.settings.methods
        names = sorted({*METHODS, *PRESETS} if allowed is None else allowed)
        return tuple(name for name in names if _serves(self.model, name))


class Contexts:
    """Texts that are compressed once and asked about many times, by name; every method may be called by any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def create(
        self, name: str, tokens: Sequence[int], text: str = "", compression: Compression | None = None, *,
        replace: bool = False,
    ) -> Future[ContextInfo]:  # fmt: skip
        """Read ``tokens`` and compress them. What the future tells is on the disk, where there is a folder.

        text: kept with it, as it is given. Raises at once ``ContextExists``, unless ``replace``, and what
        ``Engine.submit`` raises; the future raises what reading them did."""
        engine, shelf = self._engine, self._shelf
        try:
            shelf.check_name(name, replace)
            tokens = engine.checked(tokens)
            engine._check_length(len(tokens), 0)
            cache = empty_cache(engine.model, compression, engine.settings, len(tokens), document=True)
            need = engine.sizes.peak(cache, len(tokens))
            check_ever(need, engine.worker.ledger.limit, f"a context of {len(tokens):,} tokens")
            job = Making(
                name, tokens, text, cache=cache, reader=Reader(engine.model, engine.settings.chunk), shelf=shelf,
                need=need, check=lambda: shelf.check_name(name, replace),
            )  # fmt: skip
            engine.worker.add(job)
        except KeepKVError as error:
            engine.refused[type(error).__name__] += 1
            raise
        return job.future

    def get(self, name: str) -> ContextInfo:
        """Raises ``ContextMissing``."""
        return self._shelf.info(name)

    def tokens(self, name: str) -> tuple[int, ...]:
        """What was read. Raises ``ContextMissing``."""
        return self._shelf.facts(name).tokens

    def list(self) -> list[ContextInfo]:
        """All of them, by name."""
        return self._shelf.infos()

    def delete(self, name: str) -> None:
        """Also of the disk; requests that run on it go on. Raises ``ContextMissing``."""
        self._shelf.delete(name)

    @property
    def _shelf(self) -> Shelf:
        self._engine.worker  # noqa: B018  # raises where the engine was not started
        return self._engine.shelf


def cache_of(cache: Cache) -> Callable[[], Cache]:
    """What gives ``cache``, once: who has taken it is the only one to hold it."""
    held = [cache]
    return held.pop


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text, by the model's generation settings and the tokenizer."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = found if isinstance(found, list) else [found]
    return frozenset(x for x in (*ends, getattr(tokenizer, "eos_token_id", None)) if x is not None)


def _serves(model: Any, name: str) -> bool:
    """Whether a request may name the method ``name``: one that needs a calibration, it may not."""
    if name == "full":
        return True
    try:
        Cache(model, name, Budget(share=0.5))
    except KeepKVError:
        return False
    return True
