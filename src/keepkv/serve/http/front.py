"""What the paths of a server share: the engine, the model's words, and what is allowed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from keepkv.core.budget import Budget
from keepkv.serve.config import Config
from keepkv.serve.engine import Engine
from keepkv.serve.http.errors import Refused
from keepkv.serve.http.metrics import Metrics
from keepkv.serve.http.shapes.asked import Generation
from keepkv.serve.http.shapes.pieces import Pieces
from keepkv.serve.http.shapes.prompts import Prompts
from keepkv.serve.request import Compression, Finished, Sampling

LONGEST_WAIT = 600  # seconds, as told with a 429


@dataclass
class Front:
    """Of one server. mean: seconds that replies took lately. stopping: whether nothing new is taken."""

    engine: Engine
    config: Config
    prompts: Prompts
    pieces: Pieces
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    mean: float = 1.0
    stopping: bool = False

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not the one that is served."""
        if name is not None and name != self.config.served:
            said = f"the model {name[:200]!r} is not served here, but {self.config.served!r} is"
            raise Refused(404, said, "model_not_found", "model")

    def check_count(self, count: int) -> None:
        """Refuse more replies to one request than are allowed."""
        if count > self.config.max_choices:
            said = f"{count} replies are asked for at once, and at most {self.config.max_choices} are given"
            raise Refused(400, said, param="n")

    def sampling(self, asked: Generation, most: int, choice: int = 0, **more: Any) -> Sampling:
        """How reply number ``choice`` is drawn; ``most``: tokens of it."""
        return Sampling(
            max_tokens=most,
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=None if asked.seed is None else _wrapped(asked.seed + choice),
            stop=asked.stops,
            ignore_eos=asked.ignore_eos,
            **more,
        )

    def placed(
        self, compression: Compression | None, split: int | None, length: int
    ) -> tuple[Compression | None, int | None]:
        """How a prompt of ``length`` tokens is compressed whose first ``split`` are its document; None: all of them.
        Where nothing stands before the question all is kept, unless the server keeps no prompt whole. split is
        None, too, where nothing is compressed."""
        if split == 0:
            kept = self.compresses(None) and self.config.max_budget == 1.0
            return (Compression(budget=1.0) if kept else None), None
        between = split is not None and split < length and self.compresses(compression)
        return compression, split if between else None

    def compresses(self, asked: Compression | None) -> bool:
        """Whether a prompt that is long enough loses slots by what is ``asked``, or by default."""
        usual, told = self.config, asked or Compression()
        budget = usual.budget if told.budget is None else told.budget
        return budget is not None and Budget.of(budget).share != 1.0 and (told.method or usual.method) != "full"

    def room(self, read: int) -> int:
        """Tokens that a reply may have behind ``read`` of them, where the client does not say."""
        reach = self.engine.limit_tokens
        return max(1, min(self.config.max_reply or reach, reach - read))

    def ended(self, ends: Sequence[Finished]) -> None:
        """Learn from replies how long they take."""
        self.metrics.ended(ends)
        for end in ends:
            self.mean += 0.1 * (end.times.ended - end.times.arrived - self.mean)

    def retry_after(self) -> int:
        """Seconds until a request that is refused now may be taken: about as long as one of those that run lasts."""
        return min(LONGEST_WAIT, max(1, math.ceil(self.mean)))


def _wrapped(seed: int) -> int:
    """Within 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63
