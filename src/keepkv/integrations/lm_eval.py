"""The model "keepkv" of lm-evaluation-harness: the tasks of the harness, over a compressed cache.

    python -m keepkv.integrations.lm_eval --model keepkv --tasks … \\
        --model_args pretrained=Qwen/Qwen3-0.6B,method=snapkv,budget=0.25,window=16

The harness finds models in a registry that nothing but an import can enter, so this module is its command line with
"keepkv" registered. In Python an import of this module does, before ``lm_eval.simple_evaluate(model="keepkv", …)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

import torch

from keepkv.cli import arguments
from keepkv.core.budget import Budget
from keepkv.engine.cache import Cache
from keepkv.engine.versions import CACHE
from keepkv.errors import KeepKVError
from keepkv.methods import method_info
from keepkv.methods.presets import DEFAULT
from keepkv.tasks.asking import Ids, pad, read, rows_of, step

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"the model 'keepkv' of lm-eval needs {missing.name}, which is not installed: pip install 'keepkv[lm-eval]'",
        name=missing.name,
    ) from missing


T = TypeVar("T")


@dataclass
class Done:
    """What was compressed so far: requests (rows of batches), those that lost slots, bytes against a plain cache."""

    requests: int = 0
    compressed: int = 0
    bytes: int = 0
    full_bytes: int = 0

    def add(self, cache: Cache) -> None:
        """Enter the rows of a cache whose contexts have been read."""
        receipt = cache.report()
        for row, seen in enumerate(receipt.seen):
            held = min((kept for heads in receipt.kept.values() for kept in heads[row]), default=seen)
            self.requests += 1
            self.compressed += held < seen
        self.bytes += receipt.bytes
        self.full_bytes += receipt.full_bytes


@register_model("keepkv")
class KeepKVLM(HFLM):  # type: ignore[misc]
    """``HFLM`` whose contexts are read into a ``keepkv.Cache``.

    method, budget: as of ``keepkv.Cache``; the options of the method, ``store``, ``seed``, ``when.prefill``,
    ``when.every`` and ``when.cap`` stand beside them. Everything else goes to ``HFLM``.

    Log-likelihoods: the context without its last token is read and compressed; that token and the continuation are then
    fed to the compressed cache, so that every scored token was predicted from it. Generation: ``generate`` with the
    cache, whose first token is predicted while the context is still whole. Raises ``KeepKVError`` where a budget was
    given and no request of a call was compressed: its numbers would be those of the full cache.
    """

    def __init__(
        self, pretrained: Any, method: str = DEFAULT, budget: float | int | str | None = None, **kwargs: Any
    ) -> None:
        chosen = arguments.variant(str(method))
        mine = {*method_info(chosen.method).options, "store", "seed", "when.prefill", "when.every", "when.cap"}
        given = [f"{key}={kwargs.pop(key)}" for key in list(kwargs) if key in mine]
        options = {**chosen.options, **arguments.options(given, chosen.method)}  # refused before a model is loaded
        super().__init__(pretrained, **kwargs)
        self.method, self.budget, self.options = chosen.method, budget, options
        self.done = Done()
        self.new_cache()  # what cannot be served is refused here

    def new_cache(self) -> Cache:
        """An empty cache of the method, budget and options asked for."""
        return Cache(self.model, self.method, self.budget, **self.options)

    @property
    def compresses(self) -> bool:
        """Whether anything was asked for that the full cache does not do."""
        return self.method != "full" and Budget.of(self.budget or 1.0).share != 1.0

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._checked(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        if self.compresses:
            raise KeepKVError(
                "loglikelihood_rolling scores whole texts, which have no context to compress, so its numbers would be "
                "those of the full cache. Use the task 'perplexity' of keepkv eval, or budget=1.0."
            )
        totals: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return self._checked(super().generate_until, requests, disable_tqdm)

    def get_model_info(self) -> dict[str, Any]:
        """What HFLM says, and under "keepkv" what ran and how much of it was compressed."""
        done = self.done
        mine = {
            "version": version("keepkv"),
            "method": self.method,
            "options": {key: str(value) for key, value in self.options.items()},
            "budget": self.budget,
            "requests": done.requests,
            "compressed": done.compressed,
            "ratio": done.bytes / done.full_bytes if done.full_bytes else None,
        }
        return {**super().get_model_info(), "keepkv": mine}

    def _checked(self, act: Callable[..., list[T]], requests: Any, disable_tqdm: bool) -> list[T]:
        before = self.done.compressed
        found = act(requests, disable_tqdm=disable_tqdm)
        if requests and self.compresses and self.done.compressed == before:
            raise KeepKVError(
                f"nothing was compressed in {len(requests)} requests at budget={self.budget!r}, method "
                f"{self.method!r}: the contexts fit the budget, or are too short, so the numbers would be those of the "
                "full cache. Give a smaller budget or tasks with longer contexts, or budget=1.0 for the full cache."
            )
        return found

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
        cache = self.new_cache()
        out = super()._model_generate(context, max_length, stop, **{CACHE: cache}, **generation_kwargs)
        self.done.add(cache)
        return out

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Ids, Ids]], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        bare = [i for i, (_, context, _) in enumerate(requests) if len(context) < 2]
        if bare:  # nothing before the last token of the context: nothing to compress
            plain = super()._loglikelihood_tokens([requests[i] for i in bare], disable_tqdm, override_bs)
            found.update(zip(bare, plain, strict=True))
        # Long contexts first, as HFLM has it, and equal ones together: each is read once per batch.
        order = sorted(set(range(len(requests))) - set(bare), key=lambda i: (-len(requests[i][1]), requests[i][1]))
        size = override_bs or (self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size))
        bar = tqdm(total=len(order), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            pairs = [requests[i][1:] for i in chunk]
            # As long as the model reads: the start of the context is cut off, as HFLM does it.
            scores = self._score([(a[max(0, len(a) + len(b) - self.max_length - 1) :], b) for a, b in pairs])
            for i, score in zip(chunk, scores, strict=True):
                found[i] = score
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
            bar.update(len(chunk))
        bar.close()
        return [found[i] for i in range(len(requests))]

    def _score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding says it."""
        contexts = list(dict.fromkeys(tuple(context[:-1]) for context, _ in pairs))
        with (
            torch.no_grad(),
            torch.autocast(
                self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ),
        ):
            cache = self.new_cache()
            mask = read(self.model, cache, [list(context) for context in contexts])
            if cache.settings.method.when.prefill == "deferred":
                cache.compress()
            rows = [contexts.index(tuple(context[:-1])) for context, _ in pairs]
            twin, mask = rows_of(cache, mask, rows)
            self.done.add(twin)
            ids, new = pad([context[-1:] + continuation[:-1] for context, continuation in pairs], self.device)
            logits = step(self.model, twin, ids, torch.cat((mask, new), dim=1), keep=ids.shape[1])
            logits = logits.log_softmax(-1, dtype=self.softmax_dtype)
        scores = []
        for row, (_, continuation) in zip(logits, pairs, strict=True):
            target = torch.tensor(continuation, device=row.device)
            said = row[-len(continuation) :]
            total = float(said.gather(-1, target[:, None]).sum())
            scores.append((total, bool((said.argmax(-1) == target).all())))
        return scores


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
