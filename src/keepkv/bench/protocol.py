"""The protocol of a measurement, as a worker process follows it: read a prompt, decode, take the time, and answer the
parent process line by line.

Imports torch and transformers alone, so that it also runs in the environment of another library.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from keepkv.engine.versions import CACHE

WARM_PROMPT = 128  # tokens; some methods refuse prompts shorter than their window
WARM = 2  # decoded tokens before those that count: buffers grow and deferred compressions run in them


class Runner(ABC):
    """A model and one way to hold its cache; a subclass for each library."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device: torch.device = model.device

    @abstractmethod
    def start(self) -> Any:
        """An empty cache."""

    @abstractmethod
    def facts(self, cache: Any) -> dict[str, Any]:
        """``bytes``, ``full_bytes``, ``slots`` (mean per head) and what else is known of ``cache``."""

    @abstractmethod
    def content(self, cache: Any) -> tuple[int, int]:
        """Bytes that the attention of one decoded token must read: of slots, and of votes."""

    @abstractmethod
    def rewind(self, cache: Any, tokens: int) -> None:
        """Take back the newest ``tokens`` where that is possible; a cache that cannot goes on from where it is."""

    def read(self, cache: Any, ids: Tensor) -> Tensor:
        """Logits (B,V) after the tokens ``ids`` (B,T)."""
        out = self.model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def step(self, cache: Any, token: Tensor, position: int) -> Tensor:
        """Logits (B,V) after one more ``token`` (B,1), the ``position``-th of its row."""
        return self.read(cache, token)

    def compression(self, cache: Any) -> float | None:
        """Seconds spent compressing since ``start``; None where that is not told apart."""
        return None


class Measurement:
    """Measures a runner turn by turn. spec: ``context``, ``batch``, ``new``, ``chunk``, ``seed``, ``vocab``. meters:
    the module ``keepkv.measure.meters``, handed in because this file imports none of keepkv."""

    def __init__(self, runner: Runner, spec: dict[str, Any], meters: Any) -> None:
        self.runner, self.spec, self.meters = runner, spec, meters
        generator = torch.Generator().manual_seed(spec["seed"])
        ids = torch.randint(spec["vocab"], (spec["batch"], spec["context"]), generator=generator)
        self.ids = ids.to(runner.device)
        self.cache: Any = None
        self.token = self.ids[:, :1]
        self.position = 0

    @torch.no_grad()
    def warm(self) -> None:
        """A short prompt and a few tokens, so that libraries have allocated and chosen what they need."""
        cache, ids = self.runner.start(), self.ids[:, :WARM_PROMPT]
        self.runner.read(cache, ids)
        for i in range(WARM):
            self.runner.step(cache, self.token, ids.shape[1] + i)

    @torch.no_grad()
    def turn(self, fresh: bool) -> dict[str, Any]:
        """Decode ``new`` tokens; ``fresh``: after reading the prompt into a new cache, else from where the prompt ends.

        Returns seconds: ``prefill`` (compression included), ``compression``, ``first`` (until the first token is on
        the host), ``decode`` (per token and forward); ``energy``: joules for the same; bytes: ``slot_bytes``,
        ``vote_bytes`` (mean while decoding), ``peak``, ``base`` (before); and the facts of the cache after decoding.
        """
        found: dict[str, Any] = {}
        if fresh:
            self.cache = None  # freed before its successor grows
        device = self.runner.device
        with self.meters.Peak(device) as base:
            pass
        with self.meters.Peak(device) as peak:
            if fresh or self.cache is None:
                found |= self._prefill()
            found |= self._decode()
        found |= {"base": base.bytes, "peak": peak.bytes, **self.runner.facts(self.cache)}
        self.runner.rewind(self.cache, WARM + self.spec["new"])
        return found

    def _prefill(self) -> dict[str, Any]:
        self.cache = self.runner.start()
        with self.meters.Time(self.runner.device) as first:
            with self.meters.Time(self.runner.device) as prefill:
                for piece in self.ids.split(self.spec["chunk"] or self.ids.shape[1], dim=1):
                    logits = self.runner.read(self.cache, piece)
            self._choose(logits)
        self.position = self.ids.shape[1]
        seconds = {"prefill": prefill.seconds, "first": first.seconds}
        return {**seconds, "compression": self.runner.compression(self.cache)}

    def _decode(self) -> dict[str, Any]:
        start = self.position
        for _ in range(WARM):
            self._step()
        before, device, new = self.runner.content(self.cache), self.runner.device, self.spec["new"]
        with self.meters.Energy(device) as energy, self.meters.Time(device) as time:
            for _ in range(new):
                self._step()
        slots, votes = ((a + b) / 2 for a, b in zip(before, self.runner.content(self.cache), strict=True))
        self.position = start
        joules = None if energy.joules is None else energy.joules / new
        return {"decode": time.seconds / new, "energy": joules, "slot_bytes": slots, "vote_bytes": votes}

    def _step(self) -> None:
        self._choose(self.runner.step(self.cache, self.token, self.position))
        self.position += 1

    def _choose(self, logits: Tensor) -> None:
        self.token = logits.argmax(-1, keepdim=True)
        self.token.tolist()  # as everything does that streams, or stops at a token


def prepare(
    spec: dict[str, Any], runner: Callable[[Any], Runner], meters: Any, versions: dict[str, str]
) -> tuple[Measurement, dict[str, Any]]:
    """Load the model of ``spec``, hand it to ``runner``, and warm up. versions: of the libraries that decide a time."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(spec["threads"])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"]))
    made = Measurement(runner(model.to(spec["device"]).eval()), spec, meters)
    made.warm()
    return made, {"versions": versions | {"python": platform.python_version()}}


def serve(build: Callable[[dict[str, Any]], tuple[Measurement, dict[str, Any]]]) -> None:
    """Answer the parent. Its first line is the spec, from which ``build`` makes the measurement and the facts of the
    first answer; every further line asks for a turn. An error is an answer too."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand among the answers

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        measurement, facts = build(json.loads(sys.stdin.readline()))
        answer(facts)
        for line in sys.stdin:
            answer(measurement.turn(**json.loads(line)))
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        ours = any(kind.__name__ == "KeepKVError" for kind in type(error).__mro__)
        answer({"error": first if ours else f"{type(error).__name__}: {first}"})
