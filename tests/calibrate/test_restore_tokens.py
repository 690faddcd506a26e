"""Restore tokens: training makes replies more like the full cache's; published adapters do what PEFT does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

import keepkv
from keepkv.calibrate import calibrate, published
from keepkv.engine.passes.restore_slots import EMBEDDINGS, adapted
from keepkv.errors import CalibrationError

SLOTS = 4


def texts(count: int) -> tuple[list[torch.Tensor], list[list[list[int]]]]:
    generator = torch.Generator().manual_seed(3)
    made = [torch.randint(3, zoo.VOCAB, (1, 30), generator=generator) for _ in range(count)]
    return made, [[ids[0, :6].tolist()] for ids in made]


def test_training_lowers_the_divergence_it_reports_and_leaves_the_model_alone() -> None:
    model = copy.deepcopy(zoo.model("llama"))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    ids, asked = texts(5)
    options = dict(method="keydiff", budgets=[0.4], slots=SLOTS, rank=2, seed=1)
    few = calibrate("restore", model, ids, asked=asked, steps=1, **options)
    many = calibrate("restore", model, [*ids[:4], ids[0]], asked=[*asked[:4], asked[0]], steps=60, **options)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(x.requires_grad for x in model.parameters())
    (_, start), (plain, end) = few.made_with["found"]["kl"]["0.4"], many.made_with["found"]["kl"]["0.4"]
    assert end < start and end < plain  # the last text is one of those taught, so this is no claim about others
    assert many.tensors[0][EMBEDDINGS].shape == (SLOTS, 64)
    again = calibrate("restore", model, [*ids[:4], ids[0]], asked=[*asked[:4], asked[0]], steps=60, **options)
    assert again.digest == many.digest


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(slots=0), "positive"),
        (dict(rate=2.0), "a rate below 1"),
        (dict(budgets=[1.5]), "shares of the tokens"),
        (dict(method="keepkv"), "merges slots"),
    ],
)
def test_what_cannot_be_trained_is_refused(options: dict[str, Any], said: str) -> None:
    ids, asked = texts(5)
    with pytest.raises(keepkv.KeepKVError, match=said):
        calibrate("restore", zoo.model("llama"), ids, asked=asked, **{"method": "keydiff", "steps": 1, **options})


def test_half_precision_and_too_few_texts_are_refused() -> None:
    ids, asked = texts(5)
    with pytest.raises(CalibrationError, match="at least 5 texts, 2 were given"):
        calibrate("restore", zoo.model("llama"), ids[:2], asked=asked[:2])
    with pytest.raises(CalibrationError, match=r"load it with dtype=torch\.float32"):
        calibrate("restore", copy.deepcopy(zoo.model("llama")).bfloat16(), ids, asked=asked)


def adapter(folder: Path, **options: Any) -> Any:
    """A model of PEFT with random adapters, saved as RestoreKV's authors do."""
    settings = dict(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    wrapped = get_peft_model(copy.deepcopy(zoo.model("llama")), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(2)
    for name, x in wrapped.named_parameters():
        if "lora_" in name:
            x.data = torch.randn(x.shape, generator=generator) * 0.2
    wrapped.save_pretrained(folder)
    learned = torch.randn(SLOTS, 64, generator=generator)
    save_file({"restore_embeddings": learned}, folder / "restore_embeddings.safetensors")
    return wrapped, learned


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_published_adapters_are_those_of_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    wrapped, learned = adapter(tmp_path, **options)
    model = zoo.model("llama")
    found = published("restore", model, tmp_path)
    with torch.no_grad():
        wanted = wrapped(inputs_embeds=learned[None], use_cache=False).logits
        with adapted(model, found.tensors, slice(0, SLOTS)):
            got = model(input_ids=torch.zeros(1, SLOTS, dtype=torch.long), use_cache=False).logits
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


def test_foreign_and_damaged_adapters_are_refused(tmp_path: Path) -> None:
    adapter(tmp_path)
    with pytest.raises(CalibrationError, match=r"an adapter of nothing|embeddings of"):
        published("restore", zoo.model("gpt-neox"), tmp_path)
    config = tmp_path / "adapter_config.json"
    held = json.loads(config.read_text())
    config.write_text(json.dumps({**held, "use_dora": True}))
    with pytest.raises(CalibrationError, match="use_dora cannot be read"):
        published("restore", zoo.model("llama"), tmp_path)
    config.write_text("{")
    with pytest.raises(CalibrationError, match="it is no JSON"):
        published("restore", zoo.model("llama"), tmp_path)
    config.write_text(json.dumps(held))
    (tmp_path / "restore_embeddings.safetensors").write_bytes(b"x")
    with pytest.raises(CalibrationError, match="cannot read"):
        published("restore", zoo.model("llama"), tmp_path)
