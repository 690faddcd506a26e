"""Methods that need a calibration, inside vLLM: they say what a cache says, and one of another model is refused."""

from pathlib import Path

import matrix
import pytest
from served_methods import CALIBRATED
from vllm_engine import Engine, Reference, Request, agree, save_model

from keepkv.errors import CalibrationError
from keepkv.integrations.vllm import engine_args


def saved(file: Path, method: str, reference: Reference) -> Path:
    """The calibration that a method needs of the reference's model."""
    known = matrix.calibration((method, {}), reference.model)
    assert known is not None
    known.save(file)
    return file


def test_calibrated_methods(checkpoint: str, reference: Reference, tmp_path: Path) -> None:
    files = []
    for name, kind in {kind: name for name, kind in CALIBRATED.items()}.items():
        files.append(saved(tmp_path / f"{name}.safetensors", kind, reference))
    args = engine_args(calibration=files)
    engine = Engine(checkpoint, at_once=160, **args)
    try:
        known = Reference(checkpoint, args["additional_config"]["keepkv"])
        requests = [
            Request(300 + 11 * i, {"method": name, "budget": budget, "every": 8}, seed=i)
            for i, (name, budget) in enumerate((name, b) for name in (*CALIBRATED, "auto") for b in (0.25, 80))
        ]
        requests.append(Request(300))
        agree(requests, engine.replies(requests), known)
        assert engine.used == 0
    finally:
        engine.close()


def test_a_calibration_of_another_model_is_refused_at_start(
    vllm_here: None, checkpoint: str, reference: Reference, tmp_path: Path
) -> None:
    other = Reference(save_model(tmp_path / "other", layers=2))
    file = saved(tmp_path / "heads.safetensors", "headkv", other)
    with pytest.raises(CalibrationError, match="num_hidden_layers"):
        Engine(checkpoint, **engine_args(calibration=file))
