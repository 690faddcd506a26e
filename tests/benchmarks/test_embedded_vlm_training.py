"""How the model that sees is trained: the fast forward is transformers' own, and a run goes on where it stopped."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from benchmarks.embedded_vlm import names
from benchmarks.embedded_vlm.data import batch
from benchmarks.embedded_vlm.network import features, hidden, make_model, make_tokenizer
from benchmarks.embedded_vlm.train import NAMED, STATE, plan, train
from keepkv.tasks.scenes import KINDS


def test_the_fast_forward_is_that_of_transformers() -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    made = batch(random.Random(5), tokenizer, 6, 48, 2)
    ours = hidden(model, made.ids, features(model, made.pixels), made.positions) @ model.lm_head.weight.T
    theirs = model(
        input_ids=made.ids, pixel_values=made.pixels, position_ids=made.positions,
        attention_mask=torch.ones_like(made.ids),
    ).logits  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_rows_ask_and_answer() -> None:
    """Behind each token of ``at`` stands an answer and behind it the end; time only moves on."""
    tokenizer = make_tokenizer()
    made = batch(random.Random(1), tokenizer, 12, 96, 4)
    flat = made.ids.flatten()
    assert len(made.at) == len(made.kinds) > 20 and set(made.kinds) <= set(range(len(KINDS)))
    assert {tokenizer.decode([i]) for i in flat[made.at].tolist()} == {"?"}
    assert set(flat[made.at + 2].tolist()) == {tokenizer.eos_token_id}
    assert (made.positions.diff(dim=1) >= 1).all() and made.positions.max() < 4096


def test_labels_name_what_is_painted() -> None:
    shown, labels = names.frames(random.Random(0), 8)
    dark = shown.float().amax(1).unflatten(-1, (3, 16)).unflatten(-3, (3, 16)).amax((2, 4)).flatten(1) < 150
    assert torch.equal(dark, labels[..., 0] == names.NONE)
    assert torch.equal(labels[..., 2] != names.NONE, labels[..., 0] == names.GROUPS[0].index("card"))


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """A run in two parts ends with the weights of one run; the tower stays as its own stage left it."""
    for out, stops in (("whole", [4]), ("parts", [2, None])):
        for stop in stops:
            train(tmp_path / out, "2:24:1:4", 1e-3, naming=4, stop=stop)
    one, two = (torch.load(tmp_path / x / STATE, weights_only=True) for x in ("whole", "parts"))
    named = torch.load(tmp_path / "whole" / NAMED, weights_only=True)
    assert one["step"] == two["step"] == 4
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name])
        if "language_model" not in name and "lm_head" not in name:
            assert torch.equal(value, named[name])


def test_stages_of_a_curriculum_follow_one_another() -> None:
    steps = plan("2:24:1:2,4:24:1:1+8:24:1:1")
    assert steps[:2] == [(2, 24, 1)] * 2 and sorted(steps[2:]) == [(4, 24, 1), (8, 24, 1)]
