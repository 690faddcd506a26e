"""What gradients flow through, what is recomputed, and that a replay belongs to its call."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import zoo
from replayed import cache_of, distance, rollout
from running import batch, generate
from torch import Tensor

import keepkv
from keepkv import training
from keepkv.training.losses import divergence

WHEN = keepkv.When(every=3)


def fresh(arch: str = "llama") -> Any:
    return copy.deepcopy(zoo.model(arch))


def gradients(model: Any, text: Tensor, mask: Tensor, record: training.Record, at: slice = slice(None)) -> list[Tensor]:
    """Of the log-likelihood of tokens ``at`` of the text."""
    model.zero_grad()
    logits = training.replay(model, text, mask, record)[:, :-1].log_softmax(-1)
    (logits.gather(-1, text[:, 1:, None])[:, at, 0] * mask[:, 1:][:, at]).sum().backward()
    return [x.grad.clone() for x in model.parameters() if x.grad is not None]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    """The backward recomputes behind the block, when the model no longer has a cache nor the replay."""
    model = fresh()
    text, mask, _, record = rollout(model, cache_of(model, when=WHEN))
    plain = gradients(model, text, mask, record)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for a, b in zip(gradients(model, text, mask, record), plain, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    gc.collect()  # a reentrant checkpoint holds itself
    assert model.config._attn_implementation == "sdpa"


def test_the_gradient_is_that_of_the_eviction() -> None:
    """Another record, other gradients; and the first token of a reply has one (the released loss left it out)."""
    model = fresh()
    text, mask, _, record = rollout(model, cache_of(model, when=WHEN))
    first = slice(60, 61)  # position 60 foretells token 61, the first that was drawn
    found = gradients(model, text, mask, record, first)
    assert min(float(x.norm()) for x in found) > 0
    full = training.Record(torch.full_like(record.evict_at, training.NEVER), record.heads)
    assert all(torch.allclose(a, b) for a, b in zip(found, gradients(model, text, mask, full, first), strict=True))
    later = slice(63, None)
    a, b = (gradients(model, text, mask, one, later) for one in (record, full))
    assert not any(torch.allclose(x, y) for x, y in zip(a, b, strict=True))


def test_adapters_in_training() -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(fresh(), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    text, mask, scores, record = rollout(wrapped.eval(), cache_of(wrapped, when=WHEN))
    assert distance(wrapped, text, mask, scores, record) <= 2e-6
    assert gradients(wrapped.train(), text, mask, record)


def test_a_full_budget_teaches_nothing() -> None:
    """KL(full cache ‖ compressed) is 0 where nothing is evicted, and is not where something is."""
    model, inputs = zoo.model("llama"), batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        teacher = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
        apart = []
        for budget in (64, 14):
            record = training.feed(model, cache_of(model, "g-kv", budget, when=WHEN), ids, mask, 30)
            student = training.replay(model, ids, mask, record)
            apart.append(float(divergence(student, teacher, mask.bool(), 0.6)))
    assert abs(apart[0]) < 1e-5 and apart[1] > 0.1


def test_rollouts_within_a_replay_are_rollouts() -> None:
    model, inputs = zoo.model("llama"), batch()
    text, mask, scores, record = rollout(model, cache_of(model, when=WHEN))
    with training.replaying(model, record):
        other = generate(model, inputs, cache_of(model, when=WHEN), new=8)
        inner = record.rows(slice(1))
        with training.replaying(model, inner), torch.no_grad():
            model(input_ids=text[:1], attention_mask=mask[:1])
        assert distance(model, text, mask, scores, record) <= 2e-6
    assert torch.equal(other.scores_, scores)


def test_padding_behind_and_in_front() -> None:
    """The record counts tokens, not columns: other padding needs no other record."""
    model = zoo.model("llama")
    text, mask, scores, record = rollout(model, cache_of(model, when=WHEN))
    wide = torch.nn.functional.pad(text, (2, 0)), torch.nn.functional.pad(mask, (2, 0))
    assert distance(model, *wide, scores, record.wide(80)) <= 2e-6
    short = int(mask[1].sum())
    alone = text[1:2, -short:], mask[1:2, -short:]
    assert distance(model, *alone, scores[1:2], record.rows(torch.tensor([1]))) <= 2e-6


def test_the_graph_keeps_no_mask() -> None:
    """A layer's (T,T) mask exists while the layer computes, or a long text would hold those of all layers."""
    model, kept = fresh(), []
    text, mask, _, record = rollout(model, cache_of(model, when=WHEN))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(tuple(x.shape)), x)[1], lambda x: x):
        training.replay(model, text, mask, record)
    assert len(kept) > 20 and not [shape for shape in kept if shape[-2:] == (text.shape[1], text.shape[1])]
