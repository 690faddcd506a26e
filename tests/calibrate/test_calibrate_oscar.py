"""Calibration "oscar": its moments against a loop, its rotations, and what codes lose with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from running import batch, generate, row

import keepkv
from keepkv.calibrate import calibrate
from keepkv.calibrate.oscar import _reversed_bits, rotation
from keepkv.core.layer_info import LayerInfo
from keepkv.engine.rope_probe import rope_of
from keepkv.engine.versions import CACHE
from keepkv.errors import CalibrationError
from keepkv.store import CODECS
from keepkv.store.codec.hadamard import hadamard


def texts(count: int = 3, length: int = 50) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, zoo.VOCAB, (1, length), generator=generator) for _ in range(count)]


def test_moments_are_those_of_queries_and_outputs() -> None:
    """U·H·P of Σ q·qᵀ and Σ o·oᵀ, query by query in float64, from the keys and values of a full cache."""
    model, ids = zoo.model("llama"), texts(1)[0]
    made = calibrate("oscar", model, [ids])
    asked: list[torch.Tensor] = []
    attention = model.model.layers[0].self_attn
    hook = attention.q_proj.register_forward_hook(lambda module, args, out: asked.append(out))
    cache = keepkv.Cache(model, "full")
    try:
        with torch.no_grad():
            model(ids, **{CACHE: cache})
    finally:
        hook.remove()
    layer = cache.compressible[0]
    view, d = layer.store.view(), attention.head_dim
    positions = torch.arange(ids.shape[1])
    queries = asked[0].view(1, ids.shape[1], -1, d).transpose(1, 2)
    rope = rope_of(model)[0]
    queries = rope.rotate(queries, positions).double()
    heads = view.keys.shape[1]
    groups = queries.shape[1] // heads
    want = {name: torch.zeros(heads, d, d, dtype=torch.float64) for name in ("keys", "values")}
    for h in range(queries.shape[1]):
        keys, values = view.keys[0, h // groups].double(), view.values[0, h // groups].double()
        for t in range(4, ids.shape[1]):
            q = queries[0, h, t]
            out = (keys[: t + 1] @ q * d**-0.5).softmax(0) @ values[: t + 1]
            want["keys"][h // groups] += torch.outer(q, q)
            want["values"][h // groups] += torch.outer(out, out)
    for name, moment in want.items():
        got, expected = made.tensors[0][f"oscar_{name}"].double(), rotation(moment)
        # Eigenvectors have no sign: what is compared is the moment in the basis, before H and P mix it.
        for basis in (got, expected):
            mixed = (
                basis.mT[..., [_reversed_bits(d).index(i) for i in range(d)]]
                @ hadamard(d, torch.device("cpu")).double()
            )
            inside = mixed.mT @ moment @ mixed
            away = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
            assert float(away.abs().max()) < 1e-4 * float(moment.abs().max())


def test_bits_are_reversed() -> None:
    assert _reversed_bits(8) == [0, 4, 2, 6, 1, 5, 3, 7] and _reversed_bits(6) == list(range(6))


def test_fitted_codes_lose_less_than_a_hadamard_rotation() -> None:
    made = calibrate("oscar", zoo.model("llama"), texts())
    rows = made.made_with["found"]["layers"]
    assert len(rows) == 2 * len(made.tensors) and sum(row["loss"] for row in rows) / len(rows) < 0.9
    for held in made.tensors.values():
        for name in ("oscar_keys", "oscar_values"):
            turn = held[name]
            assert torch.allclose(turn @ turn.mT, torch.eye(turn.shape[-1]).expand_as(turn), atol=1e-4)


def test_a_cache_takes_the_file_and_no_other(tmp_path: Path) -> None:
    model = zoo.model("llama")
    calibrate("oscar", model, texts()).save(tmp_path / "oscar.safetensors")
    cache = keepkv.Cache(
        model, "adakv", 20, codec="oscar", calibration=tmp_path / "oscar.safetensors", window=4, sinks=2
    )
    out = generate(model, row(batch(), 0), cache)
    assert cache.report().compressed and torch.isfinite(out.scores_).all()
    with pytest.raises(CalibrationError, match="needs a calibration 'oscar'"):
        keepkv.Cache(model, "adakv", 40, codec="oscar")
    with pytest.raises(CalibrationError, match="another model"):
        keepkv.Cache(zoo.model("gpt-oss"), "adakv", 40, codec="oscar", calibration=tmp_path / "oscar.safetensors")


def test_rotations_that_are_none_are_refused() -> None:
    found = dict(calibrate("oscar", zoo.model("llama"), texts()).tensors[0])
    found["oscar_keys"] = found["oscar_keys"] * 2
    with pytest.raises(CalibrationError, match="not one orthogonal matrix"):
        CODECS.build("oscar").for_layer(LayerInfo(), found)
    with pytest.raises(CalibrationError, match="needs the rotations"):
        CODECS.build("oscar").for_layer(LayerInfo(), {})


def test_latents_are_refused() -> None:
    with pytest.raises(CalibrationError, match="latent"):
        calibrate("oscar", zoo.model("deepseek-v3"), texts())
