"""GRPO of the policy that is deployed: the model with its compressing cache (G-KV, arXiv 2512.00504, §10.2).

Replies are drawn with the cache, and their log-probabilities, of which the gradient is taken, by a forward that hides
from each query what had left the cache by then. Strictly on-policy: one update per rollout, no reference model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from keepkv.engine.cache import Cache
from keepkv.errors import KeepKVError, UnsupportedInput
from keepkv.training.record import NEVER, Record
from keepkv.training.recorder import check_replayable
from keepkv.training.replay import replaying
from keepkv.training.rl.refuse import (
    check_loss,
    check_model,
    check_on_policy,
    check_replay,
    no_number,
    without_dropout,
)
from keepkv.training.rl.rollout import NotANumber, roll


class SparseGRPO(GRPOTrainer):  # type: ignore[misc]
    """TRL's ``GRPOTrainer`` whose rollouts are drawn with a cache that evicts, and whose loss sees what they saw.

    compress: makes the cache of a rollout, of the model and with the seed that it is given: ``lambda model, seed:
        keepkv.Cache(model, "g-kv", 512, seed=seed)``. Any method that only drops slots, budget and schedule; "full"
        trains the model with the full cache.
    overlong: advantage of replies that were cut off at ``max_completion_length``: "clamp" at 0 or above (released
        code of the paper), "zero" (the paper), or "keep".
    Everything else as TRL takes it. Refused, with the reason: several updates of one rollout, a reference model, vLLM,
    half precision on a CPU, a method that merges.

    The first rollout is checked: replayed log-probabilities must be those that its tokens were drawn with.
    Logged beside TRL's numbers: ``replay/mean_gap``, ``replay/max_gap`` (nats per token), ``evicted`` (share of the
    pairs of a token and a KV head that parted).
    """

    def __init__(
        self, model: Any, reward_funcs: Any, args: Any, *, compress: Callable[[Any, int], Cache],
        overlong: str = "clamp", **kwargs: Any,
    ) -> None:  # fmt: skip
        check_on_policy(args)  # before a reference model is read
        super().__init__(model, reward_funcs, args, **kwargs)
        self.compress, self.overlong = compress, overlong
        check_model(self.model, self.args)
        check_replayable(compress(self.model, self.args.seed))
        after_cut(torch.zeros(1), torch.zeros(1, dtype=torch.bool), overlong)  # refuses an unknown rule
        without_dropout(self.model)
        self._replayed: Record | None = None
        self._replayed_logps: Tensor | None = None

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, has_tool_images: bool = False
    ) -> tuple[list[list[int]], list[list[float]]]:
        if images or multimodal_fields:
            raise UnsupportedInput("prompts with images were given: SparseGRPO trains on text")
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self.accelerator.autocast(),  # as the replay is computed
        ):
            cache = self.compress(model, self.args.seed + self.state.global_step)
            try:
                rolled = roll(model, cache, prompt_ids, self.generation_config)
            except NotANumber as found:
                what, step = "logits of a rollout are not numbers", self.state.global_step + 1
                raise no_number(step, what, prompt_ids[found.row], self.processing_class) from None
        self._replayed = rolled.record
        return rolled.replies, rolled.logps

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        assert self._replayed is not None
        evict_at, mode = self._replayed.evict_at, "train" if self.model.training else "eval"
        self._metrics[mode]["evicted"].append(float((evict_at != NEVER).float().mean()))
        columns = output["prompt_ids"].shape[1] + output["completion_ids"].shape[1]
        # Rows first: TRL shuffles and splits every tensor of this dict by its rows.
        output["evict_at"] = pad(evict_at, (0, max(0, columns - evict_at.shape[-1])), value=NEVER)
        output["advantages"] = after_cut(output["advantages"], self._cut_off(output), self.overlong)
        return output

    def _cut_off(self, output: dict[str, Any]) -> Tensor:
        """(B,) bool: replies that do not end in an end token."""
        ids, lengths = output["completion_ids"], output["completion_mask"].sum(-1, keepdim=True)
        last = ids.gather(-1, (lengths - 1).clamp(min=0))[:, 0]
        return ~torch.isin(last, torch.tensor(self.eos_token_ids, device=last.device))

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        assert self._replayed is not None
        places = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # TRL gives none, and padding moves tokens
        with replaying(self.accelerator.unwrap_model(model), self._replayed):
            found = super()._get_per_token_logps_and_entropies(
                partial(model, position_ids=places), input_ids, attention_mask, *args, **kwargs
            )
        self._replayed_logps = found[0].detach()
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        assert self._replayed is not None
        self._replayed = Record(inputs["evict_at"], self._replayed.heads)
        loss: Tensor = super()._compute_loss(model, inputs)
        assert self._replayed_logps is not None
        step, logps = self.state.global_step + 1, self._replayed_logps
        check_loss(loss, logps, inputs, step, self.processing_class)
        if self.model.training:
            gap = (logps - inputs["sampling_per_token_logps"]).abs() * inputs["completion_mask"]
            mean = float(gap.sum() / inputs["completion_mask"].sum().clamp(min=1))
            self._metrics["train"]["replay/mean_gap"].append(mean)
            self._metrics["train"]["replay/max_gap"].append(float(gap.max()))
            if self._step == 0:
                check_replay(mean, self.model.dtype, self.args.bf16 or self.args.fp16)
        return loss


def after_cut(advantages: Tensor, cut: Tensor, rule: str) -> Tensor:
    """``advantages`` (B,) with those of replies that were ``cut`` (B,) off as the ``rule`` of that name has them."""
    rules = {"clamp": advantages.clamp(min=0), "zero": torch.zeros_like(advantages), "keep": advantages}
    if rule not in rules:
        raise KeepKVError(f"overlong={rule!r} is not one of {', '.join(map(repr, rules))}")
    return torch.where(cut, rules[rule], advantages)
