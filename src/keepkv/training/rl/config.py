"""What reinforcement learning is told beyond what every training is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from keepkv.core.options import Positive, Share, Size, above, at_least, one_of
from keepkv.training.config import Common, Compress, Data, Optimise

# What an example says: the smallest training that changes something, minutes with the embedded model on a CPU.
_COMPRESS = Compress(method="snapkv", budget=24, every=4, options={"window": 4, "sinks": 2})
_DATA = Data(source="niah-multivalue", length=64, items=128, options={"keys": 2, "values": 3})
_OPTIMISE = Optimise(steps=30, batch=32, learning_rate=3e-4, schedule="constant_with_warmup", save_every=10)


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Reinforcement learning (GRPO) of the model with its compressing cache; method "full" trains the full cache.

    Each step draws ``samples`` replies to each of ``optimise.batch`` × ``optimise.accumulate`` / ``samples`` prompts,
    and is one update, of these replies alone.
    """

    compress: Compress = field(default_factory=lambda: _COMPRESS)
    data: Data = field(default_factory=lambda: _DATA)
    optimise: Optimise = field(default_factory=lambda: _OPTIMISE)
    reward: Annotated[str, "score (the task's own), exact, math-verify, or module:function"] = "score"
    samples: Annotated[int, at_least(2), "replies to each prompt; divides batch × accumulate"] = 8
    temperature: Annotated[Positive, "that logits are divided by, as drawn and as trained"] = 1.0
    top_p: Annotated[Share, above(0), "below 1: a small bias that is not corrected"] = 1.0
    reply: Annotated[Size | None, "tokens of a reply at most; null: one more than the task's answers have"] = None
    overlong: Annotated[str, one_of("clamp", "zero", "keep"), "advantage of replies that were cut off"] = "clamp"
