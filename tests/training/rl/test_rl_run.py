"""A whole training: from a config, killed, and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from keepkv.errors import KeepKVError, UnknownName

pytest.importorskip("trl")
pytest.importorskip("datasets")

import rl_setup

from keepkv.training.config import Compress, Data, Lora, Optimise, of_dict
from keepkv.training.rl import Config, Outcome, train


def config(out: Path, **more: Any) -> Config:
    given = {
        "compress": Compress(method="g-kv", budget=24, every=2, options={"window": 4, "sinks": 1}),
        "data": Data(source="niah-multivalue", length=64, items=6, options={"keys": 2, "values": 3}),
        "optimise": Optimise(steps=4, batch=8, learning_rate=1e-3, save_every=2),
        "samples": 4,
        "device": "cpu",
        "reward": "rl_setup:letters",
    }
    return Config(out=str(out), **{**given, **more})


class Killed(Exception):
    pass


def run(one: Config, kill_at: int | None = None) -> tuple[Outcome | None, dict[str, torch.Tensor]]:
    model, steps = rl_setup.tiny(), iter(range(100))

    def tell(what: str) -> None:
        if next(steps) == kill_at:
            raise Killed

    try:
        outcome = train(one, model, rl_setup.tokenizer(), tell)
    except Killed:
        outcome = None
    return outcome, {name: x.detach().clone() for name, x in model.named_parameters()}


@pytest.mark.parametrize("lora", [Lora(), Lora(rank=2)], ids=["all weights", "adapters"])
def test_a_killed_training_ends_at_the_same_weights(tmp_path: Path, lora: Lora) -> None:
    if lora.rank:
        pytest.importorskip("peft")
    outcome, weights = run(config(tmp_path / "whole", lora=lora))
    assert outcome is not None and outcome.steps == 4 and outcome.resumed == 0
    assert run(config(tmp_path / "killed", lora=lora), kill_at=3)[0] is None
    (tmp_path / "killed" / "checkpoint-4").mkdir()  # as a kill while it is written leaves it
    again, same = run(config(tmp_path / "killed", lora=lora))
    assert again is not None and again.resumed == 2 and again.steps == 4
    assert again.rewards == outcome.rewards and again.evicted == outcome.evicted
    before = dict(rl_setup.tiny().named_parameters())
    trained = [name for name in weights if name not in before or not torch.equal(before[name], weights[name])]
    assert len(trained) > 5 and all(torch.equal(weights[name], same[name]) for name in weights)
    held = json.loads((tmp_path / "killed" / "curve.json").read_text())
    assert [row["reward"] for row in held["curve"]] == list(outcome.rewards)
    assert (tmp_path / "killed" / "model" / ("adapter_config.json" if lora.rank else "config.json")).exists()


def test_the_full_cache_is_trained_by_the_same_code(tmp_path: Path) -> None:
    outcome, _ = run(
        config(tmp_path, compress=Compress(method="full", budget=1.0), optimise=Optimise(steps=1, batch=4))
    )
    assert outcome is not None and outcome.evicted == (0.0,) and outcome.rewards[0] > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"reward": "scor"}, "Did you mean 'score'"),
        ({"samples": 3}, "samples=3 replies to a prompt do not divide batch × accumulate = 8"),
        ({"compress": Compress(method="keepkv", budget=48)}, "merges slots"),
        ({"mixed": True}, "mixed: true on a CPU"),
    ],
)
def test_refused_before_anything_is_written(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(KeepKVError, match=said):
        run(config(tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


def test_a_finished_training_takes_no_step_more_and_another_config_is_refused(tmp_path: Path) -> None:
    short = Optimise(steps=1, batch=4)
    first, weights = run(config(tmp_path, optimise=short))
    again, same = run(config(tmp_path, optimise=short))
    assert first is not None and again is not None and (again.steps, again.resumed) == (1, 1)
    assert again.rewards == first.rewards and all(torch.equal(weights[name], same[name]) for name in weights)
    with pytest.raises(KeepKVError, match="holds a run with other settings"):
        run(config(tmp_path, optimise=short, temperature=0.5))


def test_a_config_of_plain_data(tmp_path: Path) -> None:
    read = of_dict(Config, {"out": str(tmp_path), "compress": {"method": "full"}, "overlong": "zero"}, "rl.yaml")
    assert read.overlong == "zero" and read.compress.method == "full"
    with pytest.raises(UnknownName, match="Did you mean 'samples'"):
        of_dict(Config, {"out": str(tmp_path), "sample": 4}, "rl.yaml")
    with pytest.raises(KeepKVError, match="overlong='drop' is not one of 'clamp', 'zero', 'keep'"):
        of_dict(Config, {"out": str(tmp_path), "overlong": "drop"}, "rl.yaml")
