"""What reinforcement learning is told beyond what every training is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from keepkv.core.options import Positive, Share, Size, above, at_least, one_of
from keepkv.training.config import Common, say


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Reinforcement learning (GRPO) of the model with its compressing cache; method "full" trains the full cache.

    Each step draws ``samples`` replies to each of ``optimise.batch`` × ``optimise.accumulate`` / ``samples`` prompts.
    """

    reward: str = say("score (of the task), exact, math-verify, or module:function", "score")
    samples: Annotated[int, at_least(2)] = say("replies to each prompt; divides batch", 8)
    temperature: Positive = say("that logits are divided by, drawn and trained", 1.0)
    top_p: Annotated[Share, above(0)] = say("below 1: a small bias that is not corrected", 1.0)
    reply: Size | None = say("tokens of a reply at most; null: of a task's answers, and one", None)
    overlong: Annotated[str, one_of("clamp", "zero", "keep")] = say("advantage of replies cut off", "clamp")
