"""GRPO under eviction: its loss is of the policy that drew the replies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from keepkv.errors import KeepKVError
from keepkv.training import NEVER, Record

pytest.importorskip("trl")
pytest.importorskip("datasets")

import rl_setup

from keepkv.training.rl import trainer as module
from keepkv.training.rl.rollout import Rollout, roll


@pytest.mark.parametrize(
    ("method", "options"),
    [("g-kv", {"window": 4, "sinks": 1}), ("keydiff", {"window": 2, "sinks": 1}), ("streaming-llm", {}), ("full", {})],
)
def test_ratio_is_one_in_every_micro_batch_of_a_step(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    """Rows of different lengths, shuffled and split by TRL: the record of each follows it."""
    trainer = rl_setup.trainer(tmp_path, compress=rl_setup.cache(method, **options), max_steps=1)
    gaps = []
    compute = trainer._compute_loss

    def watched(model: Any, inputs: dict[str, Any]) -> Any:
        loss = compute(model, inputs)
        gaps.append((trainer._replayed_logps - inputs["sampling_per_token_logps"])[inputs["completion_mask"].bool()])
        return loss

    trainer._compute_loss = watched
    trainer.train()
    ratio = torch.cat(gaps).exp()
    assert len(gaps) == 2 and len(ratio) > 40
    assert (ratio - 1).abs().max() < 2e-5
    assert (trainer.state.log_history[0]["evicted"] > 0.1) == (method != "full")


def test_a_record_of_other_rows_or_one_compression_late_is_noticed(tmp_path: Path, monkeypatch: Any) -> None:
    """The check of the first rollout: the faults of the released code stop the training."""

    def faulty(change: Any) -> Any:
        def wrong(*args: Any) -> Rollout:
            rolled = roll(*args)
            return Rollout(rolled.replies, rolled.logps, Record(change(rolled.record.evict_at), rolled.record.heads))

        return wrong

    changes = {
        "one compression late": lambda x: torch.where(x == NEVER, x, x + 3),
        "other rows": lambda x: x.flip(0),
        "one layer's": lambda x: x[:, [2, 3, 2, 3]],
        "none": lambda x: torch.full_like(x, NEVER),
    }
    for change in changes.values():
        monkeypatch.setattr(module, "roll", faulty(change))
        with pytest.raises(KeepKVError, match=r"differs from it by .* nats"):
            rl_setup.trainer(tmp_path, rl_setup.tiny(initializer_range=0.3), max_steps=1).train()


def test_the_first_token_of_a_reply_is_trained(tmp_path: Path) -> None:
    trainer = rl_setup.trainer(tmp_path)
    grads = []
    helper = trainer._get_per_token_logps_and_entropies

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = helper(*args, **kwargs)
        if found[0].requires_grad:
            found[0].register_hook(grads.append)
        return found

    trainer._get_per_token_logps_and_entropies = watched
    trainer.train()
    assert grads and all(bool((one[:, 0] != 0).any()) for one in grads)


def test_cut_off_replies(tmp_path: Path) -> None:
    advantages, cut = torch.tensor([-1.0, 2.0, -3.0]), torch.tensor([True, True, False])
    assert module.after_cut(advantages, cut, "clamp").tolist() == [0.0, 2.0, -3.0]
    assert module.after_cut(advantages, cut, "zero").tolist() == [0.0, 0.0, -3.0]
    assert module.after_cut(advantages, cut, "keep").tolist() == [-1.0, 2.0, -3.0]
    with pytest.raises(KeepKVError, match="overlong='drop' is not one of 'clamp', 'zero', 'keep'"):
        rl_setup.trainer(tmp_path, overlong="drop")


def test_cut_off_replies_of_a_rollout(tmp_path: Path, monkeypatch: Any) -> None:
    """Of two replies as long as may be, one ends there; the third is shorter."""
    trainer = rl_setup.trainer(tmp_path, overlong="zero")

    def rolled(model: Any, cache: Any, prompts: Any, config: Any) -> Rollout:
        made = roll(model, cache, prompts, config)
        replies = [[5] * 12, [5] * 11 + [2], [5] * 3 + [2], [5] * 12] * (len(prompts) // 4)
        return Rollout(replies, [[0.0] * len(one) for one in replies], made.record)

    monkeypatch.setattr(module, "roll", rolled)
    scores = iter(range(100))
    trainer.reward_funcs = [lambda completions, **others: [float(next(scores)) for _ in completions]]
    output = trainer._generate_and_score_completions([{"prompt": "Of cats"}] * 8)
    assert (output["advantages"] == 0).tolist() == [True, False, False, True] * 2


def test_a_loss_that_is_no_number_stops_with_step_and_prompt(tmp_path: Path) -> None:
    trainer = rl_setup.trainer(tmp_path, max_steps=3)
    compute = trainer._compute_loss

    def broken(model: Any, inputs: dict[str, Any]) -> Any:
        if trainer.state.global_step == 1:
            inputs["advantages"] = inputs["advantages"] * float("nan")
        return compute(model, inputs)

    trainer._compute_loss = broken
    with pytest.raises(
        KeepKVError, match=r"step 2: the loss is nan, with advantages .* ends in '(Rivers|The sun rises)"
    ):
        trainer.train()
    assert all(bool(x.isfinite().all()) for x in trainer.model.parameters())


def test_weights_that_are_no_numbers_stop_with_step_and_prompt(tmp_path: Path) -> None:
    trainer = rl_setup.trainer(tmp_path)
    trainer.model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(KeepKVError, match=r"step 1: logits of a rollout are not numbers; .* ends in 'Of cats'"):
        trainer.train()


def test_dropout_is_off(tmp_path: Path) -> None:
    trainer = rl_setup.trainer(tmp_path, rl_setup.tiny(attention_dropout=0.5), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["replay/max_gap"] < 2e-5


def test_evaluation_draws_with_the_cache_too(tmp_path: Path) -> None:
    trainer = rl_setup.trainer(tmp_path, per_device_eval_batch_size=4)
    trainer.eval_dataset = trainer.train_dataset.select(range(2))
    found = trainer.evaluate()
    assert 0.1 < found["eval_evicted"] < 1
