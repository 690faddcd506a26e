"""A text that is read and compressed once, and asked about many times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.asking.turns import turns_of
from keepkv.core.budget import Budget
from keepkv.core.when import When
from keepkv.engine.cache import Cache
from keepkv.engine.model import inner_model
from keepkv.engine.passes.again import look_again
from keepkv.engine.receipt import Receipt
from keepkv.engine.versions import CACHE
from keepkv.errors import KeepKVError
from keepkv.methods import Method
from keepkv.tasks.length import check_text, check_tokens

CHUNK = 4096  # tokens of a text that are read at once


class Context:
    """A text in a compressed cache, ready for questions.

    model, tokenizer: of transformers. Where the tokenizer has a chat template, text and questions stand in it.
    text: read once, when the context is made, and compressed before any question is known.
    budget, method, options: as ``keepkv.Cache`` takes them; ``method="many-questions"`` is what measured best for this.
        Methods that read a text twice do so here.
    system: instructions before the text; compressed with it. Give ``spans`` to protect them.
    chat: whether to use the chat template; None: where there is one.
    chunk: tokens read at once. More are faster, and take more memory at the peak.

    A question leaves no trace, unless it is asked with ``keep=True``: it and its reply then stand in the context for
    the questions that follow, whole.

    >>> report = keepkv.Context(model, tokenizer, text, budget=0.2)  # doctest: +SKIP
    >>> report.ask("Who wrote it?")  # doctest: +SKIP

    Raises ``KeepKVError`` where the text is empty or longer than the model reads. A text that fits its budget is kept
    as it is; the receipt says so.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        text: str,
        budget: Budget | float | int | str = 0.25,
        method: str | Method = "many-questions",
        *,
        system: str | None = None,
        chat: bool | None = None,
        chunk: int = CHUNK,
        **options: Any,
    ) -> None:
        if not isinstance(text, str) or not text.strip():
            raise KeepKVError(
                f"the context is {'empty' if isinstance(text, str) else type(text).__name__}: give a text"
            )
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise KeepKVError(f"chunk={chunk!r}: give the number of tokens to read at once, such as {CHUNK}")
        self.model, self.tokenizer, self.turns = model, tokenizer, turns_of(tokenizer, system, chat)
        self.chunk, self._later = chunk, False
        cache = Cache(model, method, budget, **options)
        check_text(tokenizer, inner_model(model), text, "the context")
        before = self.turns.before
        self.ids: list[int] = tokenizer.encode(before + text, add_special_tokens=not before)
        check_tokens(inner_model(model), len(self.ids), "the context")
        self.cache = self._read(cache)

    def ask(self, question: str, *, keep: bool = False, max_new_tokens: int = 128, **generate: Any) -> str:
        """The reply to ``question``: greedy, unless ``generate`` says otherwise (``do_sample=True, temperature=0.7``).

        keep: whether question and reply stay in the context for later ones; they are not compressed.
        generate: what ``model.generate`` takes, a ``streamer`` for instance.
        """
        if not isinstance(question, str) or not question.strip():
            raise KeepKVError("the question is empty: give a text")
        prompt = self._encoded(self.turns.question(question, self._later))
        check_tokens(
            inner_model(self.model), len(self.ids) + len(prompt), "the context with its question", max_new_tokens
        )
        whole = torch.tensor([self.ids + prompt], device=self.model.device)
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens, **generate}
        if self.turns.stop is not None:
            settings |= {"stop_strings": [self.turns.stop], "tokenizer": self.tokenizer}
        if self.tokenizer.eos_token_id is not None:
            settings.setdefault("pad_token_id", self.tokenizer.eos_token_id)
        settings |= {"attention_mask": torch.ones_like(whole), CACHE: self.cache.copy()}
        said = self.model.generate(whole, **settings)  # type: ignore[operator]  # transformers' types are mixed in
        reply = self._decoded(said[0, whole.shape[1] :])
        if keep:
            self._keep(prompt + self._encoded(self.turns.replied(reply)))
        return reply

    def report(self) -> Receipt:
        """The receipt of the compressed text, and of the turns that were kept."""
        return self.cache.report()

    def __repr__(self) -> str:
        return f"Context({len(self.ids):,} tokens, {self.cache!r})"

    @torch.inference_mode()
    def _read(self, cache: Cache) -> Cache:
        """Read the text into ``cache`` and compress it."""
        ids = torch.tensor([self.ids], device=self.model.device)
        if len(self.ids) > self.chunk or cache.settings.method.score.looks_again:
            cache = cache.copy(when=When("deferred"))  # read in chunks as in one piece
        self._feed(cache, ids)
        look_again(self.model, cache, ids, chunk=min(max(2, self.chunk), 2048))
        cache.compress()
        cache.compressing = False
        return cache

    @torch.inference_mode()
    def _keep(self, turn: list[int]) -> None:
        """Read ``turn`` behind what is there, on a copy that takes the cache's place when all went well."""
        cache, ids = self.cache.copy(), torch.tensor([turn], device=self.model.device)
        self._feed(cache, ids)
        self.cache, self.ids, self._later = cache, self.ids + turn, True

    def _feed(self, cache: Cache, ids: Tensor) -> None:
        with cache.reading():
            for part in ids.split(self.chunk, dim=1):
                self.model(input_ids=part, **{CACHE: cache}, use_cache=True, logits_to_keep=1)

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _decoded(self, tokens: Tensor) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return (text if self.turns.stop is None else text.partition(self.turns.stop)[0]).strip()
