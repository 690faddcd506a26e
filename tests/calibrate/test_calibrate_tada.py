"""The calibration "tada" with models: what it writes, and what codecs do to a model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM, AutoTokenizer

import keepkv
from keepkv.calibrate import calibrate
from keepkv.calibrate.rounded import Divergence, rounded
from keepkv.engine.versions import CACHE
from keepkv.errors import CalibrationError, KeepKVError
from keepkv.kernels.codes import BITS
from keepkv.store.codec.none import Plain
from keepkv.store.codec.tada import Tada
from keepkv.tasks.text import document


def texts(count: int = 8, length: int = 24) -> list[torch.Tensor]:
    return list(torch.randint(3, 60, (count, 1, length), generator=torch.Generator().manual_seed(7)))


def test_codecs_that_lose_nothing_diverge_by_nothing() -> None:
    model = zoo.model("llama")
    divergence = Divergence(model, texts(1, 40))
    plain = {i: Plain() for i in range(3)}
    by_bits = [divergence.of(0, dict.fromkeys(plain, Tada(b, centre=True))) for b in BITS]
    assert divergence.of(0, plain) == 0.0 and by_bits[0] > by_bits[1] > by_bits[2] > 0
    with torch.no_grad():
        logits = model(texts(1, 40)[0]).logits[0]
    assert torch.allclose(divergence.full[0].flip(0), logits[-len(divergence.full[0]) :], atol=1e-5)


def test_eight_bits_leave_perplexity_as_it_is() -> None:
    """Within .1 % on the embedded model, every layer and token in codes."""
    path = keepkv.embedded_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    ids = tokenizer(document()[:4000], return_tensors="pt").input_ids[:, :512]

    def loss(codecs: dict[int, Tada]) -> float:
        with torch.no_grad():
            logits = model(input_ids=ids, **{CACHE: rounded(model, codecs)}).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:]).item()

    assert loss(dict.fromkeys(range(4), Tada(8, centre=True))) == pytest.approx(loss({}), abs=1e-3)


def test_is_repeatable_within_the_target_and_serves_the_codec() -> None:
    model = zoo.model("llama")
    one, two = (calibrate("tada", model, texts(), bits=3.0, proposals=12) for _ in range(2))
    assert one.digest == two.digest and one.made_with["options"] == {"bits": 3.0, "proposals": 12}
    facts = one.made_with["found"]
    for arm in facts["arms"].values():
        assert sum(arm["bits"]) / 3 == arm["average"] <= 3 and len(arm["divergence"]) == 2
    assert [int(x["tada_bits"]) for x in one.tensors.values()] == list(facts["arms"][facts["written"]]["bits"])
    said = "\n".join(one.made_with["says"])
    assert "TaDA does not pay on this model" in said and "uniform" in said and f"written: {facts['written']}" in said
    with pytest.raises(CalibrationError, match="another model"):
        one.check(keepkv.engine.fingerprint.fingerprint(zoo.model("qwen3")))
    codec = Tada("calibrated").for_layer(keepkv.core.layer_info.LayerInfo(1, 1, 3), one.tensors[1])
    assert codec.bits == int(one.tensors[1]["tada_bits"])


@pytest.mark.parametrize(("name", "layers", "heads"), [("deepseek-v3", [0, 1, 2], 1), ("gemma4", [1, 3], 2)])
def test_latents_and_layers_beside_sliding_ones(name: str, layers: list[int], heads: int) -> None:
    """One head has no mean to share; what a cache does not compress is left as it is."""
    made = calibrate("tada", zoo.model(name), texts(), centre="auto", proposals=2)
    assert list(made.tensors) == layers and all(x["tada_shape"][0] == heads for x in made.tensors.values())
    json.dumps(made.made_with, allow_nan=False)
    rows = made.made_with["found"]["layers"]
    assert not any(row["keys"]["centred"] for row in rows) and ("never" in made.made_with["says"][3]) == (heads == 1)


def test_centring_can_be_had_all_the_same() -> None:
    found = calibrate("tada", zoo.model("llama"), texts(), centre=True, proposals=2).made_with["found"]
    assert all(row[name]["centred"] and not row[name]["pays"] for row in found["layers"] for name in ("keys", "values"))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"bits": 1.5}, "bits=1.5"),
    ({"bits": 16.0}, "from 2 to 8"),
    ({"proposals": 0}, "proposals=0"),
    ({"mean": "4bit"}, "'8bit'"),
    ({"ranks": 3}, "Its options: bits"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_what_is_wrong_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(KeepKVError, match=words):
        calibrate("tada", zoo.model("llama"), texts(), **options)


def test_too_few_texts_are_refused() -> None:
    with pytest.raises(CalibrationError, match="7 pieces of text are too few"):
        calibrate("tada", zoo.model("llama"), texts(7))
