"""A tiny model of random weights with the embedded tokenizer, and a GRPO run of it in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import keepkv
from keepkv.core.when import When
from keepkv.embedded import embedded_model

WORDS = ("Of cats", "A dog that barks loudly", "Rivers", "The sun rises in the east, and it")


def tiny(seed: int = 0, **more: Any) -> LlamaForCausalLM:
    """Two layers, four query heads on two KV heads; its tokens are nearly equally likely."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=2048, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, **{**sizes, **more}
    )
    return LlamaForCausalLM(config)


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded_model())


def cache(method: str = "g-kv", budget: Any = 8, **options: Any) -> Any:
    """What ``SparseGRPO`` takes as ``compress``: 8 slots, compressed every 3 decoded tokens."""

    def make(model: Any, seed: int) -> keepkv.Cache:
        if method == "full":
            return keepkv.Cache(model, "full")
        chosen = options or {"window": 4, "sinks": 1}
        return keepkv.Cache(model, method, budget, seed=seed, when=When(every=3), **chosen)

    return make


def letters(completions: list[str], **others: Any) -> list[float]:
    """A reward that differs between replies: the share of letters e."""
    return [one.count("e") / (1 + len(one)) for one in completions]


def settings(out: Path, **more: Any) -> Any:
    """A ``GRPOConfig``: steps of two batches of 4 replies, 4 to each prompt, of 12 tokens."""
    from trl import GRPOConfig

    given = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4, "max_steps": 2,
        "max_completion_length": 12, "learning_rate": 1e-2, "loss_type": "grpo", "bf16": False, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "beta": 0.0,
        "lr_scheduler_type": "constant", "shuffle_dataset": False,
    }  # fmt: skip
    return GRPOConfig(str(out), **{**given, **more})


def trainer(out: Path, model: Any = None, compress: Any = None, reward: Any = letters, **more: Any) -> Any:
    """``SparseGRPO`` of prompts of different lengths; ``more``: of ``settings``, but for ``peft_config`` and
    ``overlong``."""
    from datasets import Dataset

    from keepkv.training.rl.trainer import SparseGRPO

    own = {name: more.pop(name) for name in ("peft_config", "overlong") if name in more}
    data = Dataset.from_list([{"prompt": WORDS[i % len(WORDS)]} for i in range(64)])
    return SparseGRPO(
        tiny() if model is None else model, reward, args=settings(out, **more), train_dataset=data,
        processing_class=tokenizer(), compress=cache() if compress is None else compress, **own,
    )  # fmt: skip
