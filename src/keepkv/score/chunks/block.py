"""What would stay if the text had come block by block, each into a cache of the budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.allocate.select import ranks, tiers
from keepkv.core.options import Size
from keepkv.core.slots import LayerView
from keepkv.errors import KeepKVError
from keepkv.score.base import ALL_OF_IT, Wrapped


@dataclass(frozen=True)
class Block(Wrapped):
    """Another score, asked after each ``size`` slots which of those that are left leave: KeyDiff's processing of long
    prompts (arXiv 2504.15364), on the keys and values of one forward.

    As many slots as the budget holds come first. S = the number of the round in which a slot leaves, and within a round
    its rank, so that those that never leave have the largest. The keys and values are those of the whole text, as in
    kvpress; feeding a prompt in chunks with ``When("immediate")`` is the thing itself, where later tokens do not see
    what has left. The other score must look at keys and values alone.
    """

    size: Size = 128

    passed_on: ClassVar[tuple[str, ...]] = ALL_OF_IT

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score.observes or self.score.stats:
            raise KeepKVError(
                f"Block: {type(self.score).__name__} looks at queries, which are those of the whole text. Give a score "
                "of keys and values, such as 'keydiff' or 'knorm', or feed the prompt in chunks with When('immediate')."
            )

    def __call__(self, view: LayerView) -> Tensor:
        if view.budget is None:
            return self.score(view)
        slots, budget = view.slots, view.budget[:, None, None]
        place = slots.valid.cumsum(-1) - 1
        rounds = (place - budget).div(self.size, rounding_mode="floor").clamp(min=-1) + 1  # in which a slot comes
        here, score = slots.valid & (rounds <= 1), torch.zeros(slots.shape, device=slots.positions.device)
        for number in range(1, int(rounds.max()) + 2 if rounds.numel() else 1):
            order, kept = slots.kept_indices(here)
            tier = tiers(view).gather(-1, order).masked_fill(~kept, 0)
            rank = ranks(self._ask(view, here), tier)
            score.scatter_(-1, order, torch.where(kept, number - rank / (rank.shape[-1] + 1), score.gather(-1, order)))
            here = here.scatter(-1, order, kept & (rank < budget)) | (rounds == number + 1)
        return score

    def _ask(self, view: LayerView, here: Tensor) -> Tensor:
        """Scores of the slots ``here`` (B,H,S) bool, in the order of ``kept_indices``."""
        part = replace(view, slots=view.slots.select(here), protected=None, memo={})
        return self.score(part).float()
