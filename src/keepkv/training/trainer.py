"""The loop: transformers' own, whose loss is of a replay. Each step records anew what the present weights evict."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState

from keepkv.errors import KeepKVError
from keepkv.training.config import Common, Compress
from keepkv.training.feed import evaluating, feed
from keepkv.training.replay import replay
from keepkv.training.texts import Batch

STATE = "trainer_state.json"  # of a checkpoint
Loss = Callable[[Tensor, Batch], Tensor]  # of logits (B,W,V) of the last W columns


class ReplayTrainer(Trainer):
    """Trains the model as it is under eviction: each ``Batch`` is fed through the cache of ``compress`` without
    gradients, what left is recorded and replayed with gradients, and ``loss`` is taken of the logits."""

    def __init__(self, *, compress: Compress, loss: Loss, **rest: Any) -> None:
        super().__init__(**rest)
        self.remove_callback(PrinterCallback)  # which writes to stdout, where results are
        self.compress, self.loss = compress, loss
        self.model_accepts_loss_kwargs = False  # a loss is a mean over its batch, accumulated ones are divided
        self.tokens = self.evicted = 0

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one batch; raises ``KeepKVError`` where it is no number."""
        one = inputs["batch"].to(self.args.device)
        inner = self.accelerator.unwrap_model(model)
        cache = self.compress.cache(inner, seed=self.args.seed + self.state.global_step, trained=True)
        record = feed(inner, cache, one.input_ids, one.attention_mask, one.read)
        keep = one.graded.shape[1] + 1
        logits = replay(inner, one.input_ids, one.attention_mask, record, logits_to_keep=keep)[:, :-1]
        loss = self.loss(logits, one)
        if not bool(loss.isfinite()):
            raise KeepKVError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()} on {', '.join(one.names)}. The weights "
                "of the step before are kept; give a lower learning_rate, or look at these texts."
            )
        self.tokens += int(one.attention_mask.sum())
        self.evicted += record.evicted
        return (loss, logits) if return_outputs else loss


class Watch(TrainerCallback):
    """Tells how far the training is, and stops before a step whose gradient is no number."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        last = next((x["loss"] for x in reversed(state.log_history) if "loss" in x), None)
        self.tell("training" if last is None else f"loss {last:.4g}")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        if not all(bool(x.grad.isfinite().all()) for x in model.parameters() if x.grad is not None):
            raise KeepKVError(
                f"step {state.global_step + 1}: a gradient is not finite although the loss is. The weights of the step "
                "before are kept; give a lower learning_rate."
            )


def arguments(config: Common, **more: Any) -> dict[str, Any]:
    """Keywords of transformers' ``TrainingArguments`` (TRL's, too) for ``config``; more: others, which win."""
    o = config.optimise
    return {
        "output_dir": config.out, "max_steps": o.steps, "per_device_train_batch_size": o.batch,
        "gradient_accumulation_steps": o.accumulate, "learning_rate": o.learning_rate, "lr_scheduler_type": o.schedule,
        "warmup_steps": math.ceil(o.warmup * o.steps), "weight_decay": o.weight_decay, "max_grad_norm": o.clip,
        "gradient_checkpointing": o.checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "save_steps": o.save_every, "save_total_limit": 2, "seed": o.seed, "logging_steps": 1,
        "logging_nan_inf_filter": False, "report_to": [], "disable_tqdm": True, "remove_unused_columns": False,
        "dataloader_pin_memory": False, "use_cpu": config.device == "cpu", "bf16": config.mixed,
    } | more  # fmt: skip


def take_over(trainer: Trainer, checkpoint: str) -> None:
    """The weights and the state of a checkpoint, without another step, of which transformers would take one."""
    trainer._load_from_checkpoint(checkpoint)
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))


def last_checkpoint(out: Path) -> str | None:
    """The newest whole checkpoint in ``out``: a kill may have left a later one unfinished, without its state, which is
    written last."""
    whole = [path for path in out.glob("checkpoint-*") if _is_whole(path / STATE)]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _is_whole(state: Path) -> bool:
    try:
        return "global_step" in json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


@torch.no_grad()
def full_logits(teacher: nn.Module, one: Batch) -> Tensor:
    """Logits (B,W,V) of ``teacher`` with every token in sight, of the last W columns of a batch."""
    places = (one.attention_mask.cumsum(-1) - 1).clamp(min=0)
    with evaluating(teacher):
        out = teacher(
            input_ids=one.input_ids, attention_mask=one.attention_mask, position_ids=places, use_cache=False,
            logits_to_keep=one.graded.shape[1] + 1,
        )  # fmt: skip
    logits: Tensor = out.logits
    return logits[:, :-1]
