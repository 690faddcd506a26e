"""One training from start to end: what is checked before, what is kept of it, and how it goes on after a kill."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments, set_seed

from keepkv.errors import KeepKVError
from keepkv.measure.environment import MadeWith
from keepkv.measure.files import folder
from keepkv.measure.ledger import replace_text
from keepkv.measure.rows import plain
from keepkv.training.config import Common, Data, Distill, Lora, Sft, to_yaml
from keepkv.training.losses import divergence, likelihood
from keepkv.training.texts import Batch, Text, batch, from_file, from_task
from keepkv.training.trainer import Loss, ReplayTrainer, Watch, arguments, full_logits, last_checkpoint, take_over

HALF = (torch.float16, torch.bfloat16)
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a training did. losses: of each step. tokens, evicted: since it began or went on: fed, and pairs of a token
    and a KV head that parted. resumed: the step that it went on from. model: folder of the weights, or adapters."""

    model: str
    steps: int
    resumed: int
    texts: int
    left_out: int
    losses: tuple[float, ...]
    tokens: int
    evicted: int
    seconds: float


def distill(config: Distill, model: PreTrainedModel, tokenizer: Any, tell: Tell = lambda what: None) -> Outcome:
    """Train ``model`` under eviction to say what it said with every token in sight.

    model: the initial weights, which also teach: as a copy, or with adapters as the same weights without them. It is
    changed. tell: is called at each step. Checkpoints, ``curve.json`` and the model are in ``config.out``; a run that
    was killed goes on there, to the same weights. Raises ``KeepKVError`` where it cannot be trained.
    """

    def loss_of(network: Any) -> Loss:
        # Adapters leave the initial weights as they are; else a copy of these is taken, before a checkpoint is read.
        teacher = network if config.lora.rank else deepcopy(network).requires_grad_(False)

        def loss(logits: Tensor, one: Batch) -> Tensor:
            with network.disable_adapter() if config.lora.rank else nullcontext():
                theirs = full_logits(teacher, one)
            return divergence(logits, theirs, one.graded, config.temperature)

        return loss

    return run(config, model, tokenizer, loss_of, tell)


def sft(config: Sft, model: PreTrainedModel, tokenizer: Any, tell: Tell = lambda what: None) -> Outcome:
    """Train ``model`` under eviction to say the replies of the texts. Otherwise as ``distill``."""

    def loss(logits: Tensor, one: Batch) -> Tensor:
        return likelihood(logits, one.input_ids[:, -one.graded.shape[1] :], one.graded)

    return run(config, model, tokenizer, lambda network: loss, tell)


def run(
    config: Common, model: PreTrainedModel, tokenizer: Any, loss_of: Callable[[nn.Module], Loss], tell: Tell
) -> Outcome:
    """The steps of ``config``, with the loss for the network that is trained; see ``distill``."""
    check_trainable(config, model)
    config.compress.cache(model)  # what it refuses is refused before anything is read or written
    out = settle(config)
    texts, left_out = texts_of(config.data, tokenizer)
    set_seed(config.optimise.seed)
    network = adapted(model, config.lora)
    trainer = ReplayTrainer(
        compress=config.compress, loss=loss_of(network), model=network, train_dataset=texts, callbacks=[Watch(tell)],
        args=TrainingArguments(**arguments(config)),
        data_collator=lambda some: {"batch": batch(some, tokenizer.pad_token_id or 0)},
    )  # fmt: skip
    last, started = last_checkpoint(out), time.perf_counter()
    resumed = 0 if last is None else int(last.rpartition("-")[2])
    if last is not None and resumed >= config.optimise.steps:
        take_over(trainer, last)
    else:
        trainer.train(resume_from_checkpoint=last)
    curve = [x for x in trainer.state.log_history if "loss" in x]
    keep(out, network, tokenizer, {"curve": curve, "made_with": plain(MadeWith.of(model))})
    return Outcome(
        str(out / "model"), trainer.state.global_step, resumed, len(texts), left_out, tuple(x["loss"] for x in curve),
        trainer.tokens, trainer.evicted, time.perf_counter() - started,
    )  # fmt: skip


def check_trainable(config: Common, model: PreTrainedModel) -> None:
    """Raise ``KeepKVError`` where ``model`` cannot be trained as ``config`` says."""
    missing = [name for name in ("accelerate", *(["peft"] if config.lora.rank else [])) if find_spec(name) is None]
    if missing:
        raise KeepKVError(f"training needs {' and '.join(missing)}: pip install 'keepkv[train]'")
    if model.device.type == "cpu" and (model.dtype in HALF or config.mixed):
        how = "mixed: true" if config.mixed else f"weights in {str(model.dtype).removeprefix('torch.')}"
        raise KeepKVError(
            f"{how} on a CPU: small gradients become 0 there, and it is slower than float32. Give dtype: float32 and "
            "mixed: false, or a GPU."
        )


def settle(config: Common) -> Path:
    """The folder of a run, with its config. Raises ``KeepKVError`` where it holds a run of another config."""
    out = folder(config.out)
    path, text = out / "config.yaml", to_yaml(config)
    if path.exists() and (held := path.read_text(encoding="utf-8")) != text:
        lines = [line.strip() for line in held.splitlines() if line not in text.splitlines()]
        raise KeepKVError(
            f"{str(out)!r} holds a run with other settings ({'; '.join(lines[:3])}). Give another out, or delete it."
        )
    replace_text(path, text)
    return out


def texts_of(data: Data, tokenizer: Any) -> tuple[list[Text], int]:
    """The texts, and how many were left out as too long. Raises ``KeepKVError`` where none is left."""
    path = Path(data.source).expanduser()
    if path.suffix in (".jsonl", ".json", ".gz") or path.is_file():
        found = from_file(tokenizer, path)
    else:
        found = from_task(tokenizer, data.source, data.length, data.items, data.seed, data.options, data.together)
    kept = [one for one in found if data.longest is None or one.tokens <= data.longest]
    if not kept:
        raise KeepKVError(f"data: each of {len(found)} texts is longer than {data.longest} tokens")
    return kept, len(found) - len(kept)


def adapted(model: PreTrainedModel, lora: Lora) -> nn.Module:
    """``model`` with adapters, or itself."""
    if not lora.rank:
        return model
    from peft import LoraConfig, get_peft_model

    targets = lora.targets if lora.targets == "all-linear" else lora.targets.split(",")
    made = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    wrapped: nn.Module = get_peft_model(model, made)
    return wrapped


def keep(out: Path, network: Any, tokenizer: Any, facts: dict[str, Any]) -> None:
    """Write the weights, or adapters, and what was noted of the run."""
    network.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    replace_text(out / "curve.json", json.dumps(facts, indent=1) + "\n")
