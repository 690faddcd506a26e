"""A training from start to end on a tiny model: after a kill it goes on to the same weights; it stops where it must."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from keepkv.embedded import embedded_model
from keepkv.errors import KeepKVError
from keepkv.training.config import Compress, Data, Distill, Lora, Optimise, Sft
from keepkv.training.run import distill, sft
from keepkv.training.trainer import last_checkpoint

SHAPE = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=2048, pad_token_id=0,
)  # fmt: skip
COMPRESS = Compress(budget=16, every=8, options={"window": 4, "sinks": 2})
DATA = Data(length=32, items=6, options={"kind": "copy"})
STEPS = Optimise(steps=4, batch=2, save_every=2, learning_rate=1e-2)


class Killed(BaseException):
    """As good as a kill: nothing of ours runs after it."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded_model())


def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def told(kind: type[Any], out: Path, **more: Any) -> Any:
    given = {"compress": COMPRESS, "data": DATA, "optimise": STEPS, "device": "cpu"}
    return kind(out=str(out), **{**given, **more})


def weights(out: Path) -> dict[str, torch.Tensor]:
    (path,) = (out / "model").glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize(("kind", "lora"), [(Distill, 0), (Sft, 0), (Distill, 4)])
def test_a_killed_run_goes_on_to_the_same_weights(kind: type[Any], lora: int, tokenizer: Any, tmp_path: Path) -> None:
    train = distill if kind is Distill else sft
    whole, killed = (told(kind, tmp_path / name, lora=Lora(rank=lora)) for name in ("whole", "killed"))
    done = train(whole, model(), tokenizer)
    assert done.steps == len(done.losses) == 4 and done.evicted and done.losses[-1] != done.losses[0]

    def kill(what: str) -> None:
        if (tmp_path / "killed" / "checkpoint-2").exists():
            raise Killed

    with pytest.raises(Killed):
        train(killed, model(), tokenizer, kill)
    unfinished = tmp_path / "killed" / "checkpoint-3"  # as a kill amid a save leaves it
    shutil.copytree(tmp_path / "killed" / "checkpoint-2", unfinished)
    (unfinished / "trainer_state.json").write_text('{"epoch"', encoding="utf-8")
    assert str(last_checkpoint(tmp_path / "killed")).endswith("checkpoint-2")
    again = train(killed, model(), tokenizer)
    assert again.resumed == 2 and again.losses == done.losses
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())
    curve = json.loads((tmp_path / "killed" / "curve.json").read_text())
    assert [one["step"] for one in curve["curve"]] == [1, 2, 3, 4] and curve["made_with"]["device"] == "cpu"
    finished = train(killed, model(), tokenizer)
    assert finished.resumed == finished.steps == 4 and all(
        torch.equal(x, a[n]) for n, x in weights(tmp_path / "killed").items()
    )


def test_a_loss_that_is_no_number_stops(tokenizer: Any, tmp_path: Path) -> None:
    broken = model()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(KeepKVError, match=r"step 1: the loss is nan on long-decode, seed \d, question|seed \d"):
        sft(told(Sft, tmp_path / "a"), broken, tokenizer)
    assert last_checkpoint(tmp_path / "a") is None


def test_a_gradient_that_is_no_number_stops_before_the_step(tokenizer: Any, tmp_path: Path) -> None:
    made = model()
    made.model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * torch.inf)
    before = made.model.layers[1].mlp.up_proj.weight.clone()
    with pytest.raises(KeepKVError, match="step 1: a gradient is not finite"):
        sft(told(Sft, tmp_path / "a"), made, tokenizer)
    assert torch.equal(made.model.layers[1].mlp.up_proj.weight, before)


@pytest.mark.parametrize(
    ("changes", "half", "said"),
    [
        ({}, True, "weights in bfloat16 on a CPU"),
        ({"mixed": True}, False, "mixed: true on a CPU"),
        ({"compress": replace(COMPRESS, method="cam")}, False, "merges slots"),
        ({"compress": replace(COMPRESS, budget=2)}, False, "below the 6 that"),
        ({"data": replace(DATA, longest=10)}, False, "longer than 10 tokens"),
        ({"data": replace(DATA, source="long-decod")}, False, "Did you mean 'long-decode'"),
    ],
    ids=lambda x: None,
)
def test_what_is_refused(changes: dict[str, Any], half: bool, said: str, tokenizer: Any, tmp_path: Path) -> None:
    made = model().bfloat16() if half else model()
    with pytest.raises(KeepKVError, match=said):
        sft(told(Sft, tmp_path / "a", **changes), made, tokenizer)
    assert made.config._attn_implementation == "sdpa"


def test_a_folder_of_another_run(tokenizer: Any, tmp_path: Path) -> None:
    short = replace(STEPS, steps=1)
    sft(told(Sft, tmp_path / "a", optimise=short), model(), tokenizer)
    with pytest.raises(KeepKVError, match=r"holds a run with other settings \(steps: 1\)"):
        sft(told(Sft, tmp_path / "a"), model(), tokenizer)
