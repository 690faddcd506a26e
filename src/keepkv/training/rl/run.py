"""One reinforcement learning from start to end."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel, PrinterCallback, set_seed

from keepkv.errors import KeepKVError
from keepkv.measure.environment import MadeWith
from keepkv.measure.rows import plain
from keepkv.training.rl.config import Config
from keepkv.training.rl.prompts import Prompts, in_order, prompts_of
from keepkv.training.rl.rewards import reward
from keepkv.training.run import Tell, adapted, check_trainable, keep, settle
from keepkv.training.trainer import Watch, arguments, last_checkpoint, take_over


@dataclass(frozen=True)
class Outcome:
    """What a training did. rewards: mean over the replies of each step. evicted: the same of the share of pairs of a
    token and a KV head that parted. resumed: the step that it went on from. model: folder of the weights, or adapters.
    """

    model: str
    steps: int
    resumed: int
    prompts: int
    rewards: tuple[float, ...]
    evicted: tuple[float, ...]
    seconds: float


def train(config: Config, model: PreTrainedModel, tokenizer: Any, tell: Tell = lambda what: None) -> Outcome:
    """Train ``model`` to earn the reward with its compressing cache. It is changed.

    tell: is called at each step. Checkpoints, ``curve.json`` and the model are in ``config.out``; a run that was killed
    goes on there, on a CPU to the same weights. Raises ``KeepKVError`` where it cannot be trained, and for a loss that
    is no number.
    """
    if find_spec("trl") is None:
        raise KeepKVError("reinforcement learning needs trl: pip install 'keepkv[train]'")
    check_trainable(config, model)
    config.compress.cache(model)  # what it refuses is refused before anything is read or written
    prompts = prompts_of(config.data, tokenizer)
    graded = reward(config.reward, tokenizer, prompts.asked)
    settings = grpo_settings(config, prompts)
    out = settle(config)
    set_seed(config.optimise.seed)  # adapters begin at random
    trainer = _trainer(config, adapted(model, config.lora), tokenizer, prompts, graded, settings, tell)
    last, started = last_checkpoint(out), time.perf_counter()
    resumed = 0 if last is None else int(last.rpartition("-")[2])
    if last is not None and resumed >= config.optimise.steps:
        take_over(trainer, last)
    else:
        trainer.train(resume_from_checkpoint=last)
    curve = [x for x in trainer.state.log_history if "reward" in x]
    keep(out, trainer.model, tokenizer, {"curve": curve, "made_with": plain(MadeWith.of(model))})
    return Outcome(
        str(out / "model"), trainer.state.global_step, resumed, len(prompts.rows), tuple(x["reward"] for x in curve),
        tuple(x["evicted"] for x in curve), time.perf_counter() - started,
    )  # fmt: skip


def grpo_settings(config: Config, prompts: Prompts) -> Any:
    """The ``GRPOConfig`` of TRL for ``config``. Raises ``KeepKVError`` where its numbers do not fit together."""
    from trl import GRPOConfig

    o = config.optimise
    if o.batch * o.accumulate % config.samples:
        raise KeepKVError(
            f"samples={config.samples} replies to a prompt do not divide batch × accumulate = {o.batch * o.accumulate}"
        )
    reply = config.reply or prompts.longest
    if reply is None:
        raise KeepKVError("reply: how many tokens a reply may have is not known for prompts of a file: give it")
    own = {
        "max_completion_length": reply, "num_generations": config.samples, "temperature": config.temperature,
        "top_p": config.top_p, "loss_type": "grpo", "beta": 0.0, "num_iterations": 1, "disable_dropout": True,
        "shuffle_dataset": False, "fp16": False,
    }  # fmt: skip
    return GRPOConfig(**arguments(config, **own))


def _trainer(
    config: Config, network: Any, tokenizer: Any, prompts: Prompts, graded: Any, settings: Any, tell: Tell
) -> Any:
    from datasets import Dataset

    from keepkv.training.rl.trainer import SparseGRPO

    o = config.optimise
    many = o.steps * o.batch * o.accumulate // config.samples
    trainer = SparseGRPO(
        network, graded, args=settings, processing_class=tokenizer, callbacks=[WatchReward(tell)],
        train_dataset=Dataset.from_list(in_order(prompts.rows, many, o.seed)), overlong=config.overlong,
        compress=lambda model, seed: config.compress.cache(model, seed, trained=True),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # which writes to stdout, where results are
    return trainer


class WatchReward(Watch):
    """The same, telling the reward."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        last = next((x["reward"] for x in reversed(state.log_history) if "reward" in x), None)
        self.tell("training" if last is None else f"reward {last:.3g}")
