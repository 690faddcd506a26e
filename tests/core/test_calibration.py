"""Calibrations as files, and the fingerprint that ties them to a model."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file

import keepkv
from keepkv.core.calibration import Calibration, check_calibration, check_same, of_layer
from keepkv.engine.fingerprint import fingerprint
from keepkv.errors import CalibrationError, KeepKVError

FACTS = {"model_type": "llama", "rope_parameters": {"rope_theta": 1e4}, "name": "some/model", "weights": "abc"}


class Needy:
    needs_calibration = "numbers"


def made(kind: str = "numbers", **facts: Any) -> Calibration:
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(2, 3, generator=generator)
    tensors = {
        0: {"mean": wide, "bits": torch.tensor(4, dtype=torch.uint8)},
        10: {"mean": wide.to(torch.bfloat16), "basis": wide.double().T},  # not contiguous
        2: {"empty": torch.empty(0, 4)},
    }
    return Calibration(kind, tensors, {**FACTS, **facts}, {"tokens": 12, "command": "keepkv calibrate numbers"})


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    one = made()
    one.save(tmp_path / "a.safetensors")
    two = Calibration.load(str(tmp_path / "a.safetensors"))
    assert (two.kind, two.fingerprint, two.made_with) == (one.kind, one.fingerprint, one.made_with)
    assert list(two.tensors) == [0, 2, 10]
    for layer, held in one.tensors.items():
        assert held.keys() == two.tensors[layer].keys()
        for name, x in held.items():
            y = two.tensors[layer][name]
            assert x.dtype == y.dtype and torch.equal(x, y)
    assert one.digest == two.digest != replace(one, made_with={}).digest


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    made().save(path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("keepkv.core.wholefile.os.replace", full)
    with pytest.raises(CalibrationError, match="No space left"):
        made("other").save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot write"):
        made().save(tmp_path / "no" / "a.safetensors")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def headless(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def flipped(path: Path) -> None:
    held = bytearray(path.read_bytes())
    held[-1] ^= 1
    path.write_bytes(bytes(held))


def edited(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"some/model", b"evil/model"))


def foreign(path: Path) -> None:
    save_file(load_file(path), path)


def a_cache(path: Path) -> None:
    keepkv.Cache(zoo.model("llama"), "full").save(path)


def text(path: Path) -> None:
    path.write_text("not tensors")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncated, "truncated"),
        (headless, "truncated"),
        (flipped, "checksum"),
        (edited, "checksum"),
        (foreign, "not a calibration"),
        (a_cache, "not a calibration"),
        (text, "truncated"),
        (Path.unlink, "no such file"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_damaged_and_foreign_files_are_refused(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    path = tmp_path / "a.safetensors"
    made().save(path)
    damage(path)
    with pytest.raises(CalibrationError, match=reason) as error:
        Calibration.load(path)
    assert str(path) in str(error.value) and isinstance(error.value, KeepKVError)


def test_another_model_is_refused_with_what_differs_and_the_command() -> None:
    made().check({**FACTS, "name": "elsewhere"}, layers=[0, 2])
    with pytest.raises(CalibrationError) as error:
        made().check({**FACTS, "rope_parameters": {"rope_theta": 5e5}, "weights": "def", "name": "my model"})
    message = str(error.value)
    assert "rope_parameters" in message and "weights ('abc', given 'def')" in message and "model_type" not in message
    assert "keepkv calibrate numbers --model 'my model' --text FILE --out numbers.safetensors" in message
    with pytest.raises(CalibrationError, match=r"nothing for layers \[1, 3\].*keepkv calibrate numbers"):
        made().check(FACTS, layers=range(4))


def test_weights_that_cannot_be_read_are_said() -> None:
    with pytest.warns(UserWarning, match="not compared.*offloaded"):
        made().check({**FACTS, "weights": None, "unread": "x.weight is offloaded"})


def test_a_cache_gets_what_its_pieces_need_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    made().save(path)

    def check(pieces: list[object], given: Any) -> dict[str, Calibration]:
        return check_calibration(pieces, given, lambda: FACTS, [0])

    assert check([object()], None) == {}
    for given in (path, str(path), made(), [path]):
        assert check([object(), Needy()], given)["numbers"].digest == made().digest
    with pytest.raises(CalibrationError, match=r"Needy needs a calibration 'numbers'.*given: none.*keepkv calibrate n"):
        check([Needy()], None)
    with pytest.raises(CalibrationError, match=r"given: 'other'.*keepkv calibrate numbers --model some/model"):
        check([Needy()], made("other"))
    with pytest.raises(CalibrationError, match="'other' was given, and no part"):
        check([Needy()], [made(), made("other")])
    with pytest.raises(CalibrationError, match="made for another model"):
        check([Needy()], made(model_type="qwen3"))


def test_layers_are_copied_to_a_device_once() -> None:
    one, cpu = made(), torch.device("cpu")
    assert of_layer({}, 0, cpu) is None and of_layer({"numbers": one}, 1, cpu) == {}
    assert one.layer(0, cpu) is one.layer(0, cpu)
    both = of_layer({"numbers": one, "more": Calibration("more", {0: {"rank": torch.ones(1)}}, {}, {})}, 0, cpu)
    assert both is not None and set(both) == {"mean", "bits", "rank"}


def test_a_saved_cache_asks_for_the_same_calibration() -> None:
    one, path = made(), Path("ctx.safetensors")
    check_same({}, {}, path)
    check_same({"numbers": one.digest}, {"numbers": one}, path)
    for given in ({}, {"numbers": made(weights="def")}):
        with pytest.raises(CalibrationError, match="Pass the same file"):
            check_same({"numbers": one.digest}, given, path)


# --- fingerprints ----------------------------------------------------------------------------------------------


def differing(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_model_equals_itself_and_no_other(name: str) -> None:
    mine = fingerprint(zoo.model(name))
    assert mine == fingerprint(zoo.model(name)) and len(mine["weights"]) == 64
    assert all(differing(mine, fingerprint(zoo.model(other))) for other in zoo.ZOO if other != name)


def test_other_weights_of_the_same_shape() -> None:
    ours = zoo.model("llama")
    theirs = copy.deepcopy(ours)
    with torch.no_grad():  # one matrix of one layer, as a merged adapter changes it
        theirs.model.layers[1].self_attn.q_proj.weight += 0.01 * torch.randn(64, 1) @ torch.randn(1, 64)
    assert differing(fingerprint(ours), fingerprint(theirs)) == {"weights"}


def test_other_rotation_of_the_same_weights() -> None:
    ours = zoo.model("llama")
    theirs = copy.deepcopy(ours)
    theirs.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    assert differing(fingerprint(ours), fingerprint(theirs)) == {"rope_parameters"}


def test_the_precision_in_which_a_model_is_loaded_does_not_matter() -> None:
    wide = zoo.model("qwen3")
    assert fingerprint(copy.deepcopy(wide).to(torch.bfloat16)) == fingerprint(wide)


def test_without_its_head_a_model_is_the_same() -> None:
    assert fingerprint(zoo.model("llama").model)["weights"] == fingerprint(zoo.model("llama"))["weights"]


def test_active_adapters_count() -> None:
    """As PEFT marks the modules that it wraps; it is not needed for the test."""
    model = copy.deepcopy(zoo.model("llama"))
    before, wrapped = fingerprint(model), model.model.layers[0].self_attn.q_proj
    wrapped.active_adapters = ["legal"]
    assert differing(before, fingerprint(model)) == {"adapters"} and fingerprint(model)["adapters"] == ["legal"]
    wrapped.disable_adapters = True
    assert fingerprint(model) == before


def test_weights_out_of_memory_are_left_out_with_a_reason() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(zoo.model("llama").config)
    found = fingerprint(model)
    assert found["weights"] is None and "embed_tokens.weight is not in memory" in found["unread"]


def test_it_is_cheap() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(keepkv.embedded_model())
    fingerprint(model)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        fingerprint(model)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.05
