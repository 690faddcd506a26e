"""What this training refuses, each with the reason and the remedy in one line."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from keepkv.errors import KeepKVError, UnsupportedInput

# Nats per token between the draw and the replay, on average. Rounding is far below it; a mask that is one
# compression late, or of another layer, is far above.
MOST_GAP = {torch.float32: 1e-3, torch.float64: 1e-3}
MOST_GAP_OF_HALF = 0.05


def check_on_policy(args: Any) -> None:
    """Raise ``UnsupportedInput`` where ``args``, a ``GRPOConfig``, asks for more than one update of a rollout, for a
    reference model, or for rollouts that no cache of ours draws; warn where draws are not the policy's."""
    every, steps = args.steps_per_generation, args.gradient_accumulation_steps
    refusals = {
        f"num_iterations={args.num_iterations}": (
            args.num_iterations != 1,
            "what is evicted follows the weights, so after an update a rollout's record is another policy's. Give 1",
        ),
        f"steps_per_generation={every} with gradient_accumulation_steps={steps}": (
            steps % every != 0,
            "a rollout would see several updates, and its record is of the first weights alone. Leave "
            "steps_per_generation out, or give a divisor of gradient_accumulation_steps",
        ),
        f"beta={args.beta}": (
            args.beta != 0.0,
            "the reference model would evict other tokens, so its log-probabilities under this record mean nothing. "
            "Give 0",
        ),
        "use_vllm=True": (args.use_vllm, "vLLM tells nobody what left its cache. Give False"),
        "use_transformers_continuous_batching=True": (
            args.use_transformers_continuous_batching,
            "its pages are a cache of its own. Give False",
        ),
        f"cache_implementation={args.cache_implementation!r}": (
            args.cache_implementation is not None,
            "rollouts are drawn with the cache that compress= makes. Leave it out",
        ),
        "mask_truncated_completions=True": (
            args.mask_truncated_completions,
            "it hides the whole reply from the replay. Give False, and overlong='zero' for replies that were cut off",
        ),
        f"repetition_penalty={args.repetition_penalty}": (
            args.repetition_penalty != 1.0,
            "tokens would be drawn from another distribution than the one that is trained. Give 1.0",
        ),
    }
    for given, (refused, why) in refusals.items():
        if refused:
            raise UnsupportedInput(f"{given}: {why}.")
    cut = [f"{name}={getattr(args, name)}" for name, none in _ALL.items() if getattr(args, name) not in none]
    if cut:
        warnings.warn(
            f"{', '.join(cut)}: tokens are drawn from part of the distribution and trained as if from all of it, a "
            "small bias that is not corrected. Leave it out for exact gradients.",
            stacklevel=3,
        )


_ALL: dict[str, tuple[Any, ...]] = {"top_p": (1.0,), "top_k": (0, None), "min_p": (None, 0.0)}


def check_model(model: nn.Module, args: Any) -> None:
    """Raise ``UnsupportedInput`` for half precision on a CPU, and where nothing is to be trained."""
    first = next(model.parameters())
    half = [x.dtype for x in model.parameters() if x.dtype in (torch.float16, torch.bfloat16)]
    half += [torch.bfloat16] * args.bf16 + [torch.float16] * args.fp16
    if half and first.device.type == "cpu":
        raise UnsupportedInput(
            f"a model in {str(half[0]).removeprefix('torch.')} on a CPU: small gradients become 0 there, and it is "
            "slower than float32. Load it with dtype=torch.float32, and give bf16=False and fp16=False."
        )
    if not any(x.requires_grad for x in model.parameters()):
        raise UnsupportedInput("no parameter of the model takes a gradient. Give peft_config=, or unfreeze some.")


def without_dropout(model: nn.Module) -> None:
    """Set every dropout of ``model`` to 0: a rollout has none, and the replay must be its equal."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def check_replay(gap: float, dtype: torch.dtype, mixed: bool = False) -> None:
    """Raise ``KeepKVError`` where the replay of the first rollout is not the rollout: ``gap`` nats per token. mixed:
    weights of ``dtype`` were computed with in half precision."""
    most = MOST_GAP_OF_HALF if mixed else MOST_GAP.get(dtype, MOST_GAP_OF_HALF)
    if not gap <= most:
        raise KeepKVError(
            f"the replay of the first rollout differs from it by {gap:.2g} nats per token, and {most:g} is what "
            f"rounding explains in {str(dtype).removeprefix('torch.')}: the gradient would be of another policy. Try "
            "float32; if that differs too, please report the model and the method."
        )


def check_loss(loss: Tensor, logps: Tensor, inputs: dict[str, Any], step: int, tokenizer: Any) -> None:
    """Raise ``KeepKVError`` for a loss that is not finite, naming the step and the first such prompt.

    logps (B,T): of the replies; inputs: the batch as TRL has it.
    """
    if bool(torch.isfinite(loss)):
        return
    bad = ~torch.isfinite(logps).all(-1)
    row = int(bad.long().argmax()) if bool(bad.any()) else 0
    what = f"the loss is {float(loss)}, and {int(bad.sum())} of {len(bad)} replies have log-probabilities of no number"
    if not bool(bad.any()):
        what = f"the loss is {float(loss)}, with advantages {[round(x, 3) for x in inputs['advantages'].tolist()]}"
    ids = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
    raise no_number(step, what, ids, tokenizer)


def no_number(step: int, what: str, prompt: Any, tokenizer: Any) -> KeepKVError:
    """The error that stops a training at ``step``; prompt: token ids of the first one of the batch that is to blame."""
    said = tokenizer.decode(prompt, skip_special_tokens=True)[-80:]
    return KeepKVError(
        f"step {step}: {what}; in the batch, see the prompt that ends in {said!r}. The weights of the step before are "
        "kept: go on from the last checkpoint with a lower learning rate, or look at that prompt."
    )
