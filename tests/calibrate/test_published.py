"""Learned scores: formulas against loops, files as their authors publish them, and a map that is fitted here."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import zoo
from published import gate_file, kvzap_files, shape_of
from running import batch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import keepkv
from keepkv.calibrate import batches, calibrate, published
from keepkv.core.calibration import Calibration
from keepkv.engine.versions import CACHE
from keepkv.errors import CalibrationError, UnsupportedModel
from keepkv.score.learned.fast_kvzip import PREFIX, FastKVzip
from keepkv.score.learned.kvzap import BIAS, INNER, WEIGHT, KVzap
from keepkv.tasks.text import document

HIDDEN = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))


def kvzap(folder: Path, inner: int | None = None) -> Calibration:
    return published("kvzap", zoo.model("llama"), kvzap_files(folder, 3, 2, 64, inner))


@pytest.mark.parametrize("inner", [None, 7])
def test_kvzap_is_its_network(inner: int | None, tmp_path: Path) -> None:
    known = kvzap(tmp_path, inner)
    held = load_file(tmp_path / "model.safetensors")
    for index in range(3):
        got = KVzap().token_stats(HIDDEN, known.tensors[index])["kvzap"]
        assert got.shape == (2, 2, 5) and got.dtype == torch.float32
        for b in range(2):
            for t in range(5):
                x = [float(y) for y in HIDDEN[b, t].double()]
                layers = [f"layers.{index}"] if inner is None else [f"layers.{index}.0", f"layers.{index}.2"]
                for name in layers:
                    w, bias = held[f"{name}.weight"].double(), held[f"{name}.bias"].double()
                    x = [float(bias[i]) + sum(float(w[i, j]) * x[j] for j in range(len(x))) for i in range(len(w))]
                    if inner is not None and name.endswith(".0"):
                        x = [y * 0.5 * (1 + math.erf(y / math.sqrt(2))) for y in x]
                assert_close(got[b, :, t].double(), torch.tensor(x).double(), rtol=1e-5, atol=1e-5)


def naive_gate(gate: dict[str, Tensor], h: Tensor, head: int) -> float:
    """The share of one token in one KV head, float64, one query after another."""
    rank, groups, sinks = len(gate["q_norm.weight"]), gate["b"].shape[-1], gate["k_base"].shape[2]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight.double() * x / (x.square().mean() + 1e-6).sqrt()

    wk = gate["k_proj.weight"].double()[head * rank : (head + 1) * rank]
    key, shares = norm(wk @ h, gate["k_norm.weight"]), []
    for g in range(groups):
        at = (head * groups + g) * rank
        q = gate["q_proj.weight"].double()[at : at + rank] @ h + gate["q_proj.bias"].double()[at : at + rank]
        q = norm(q, gate["q_norm.weight"])
        own = math.exp(float(q @ key) / math.sqrt(rank) + float(gate["b"][head, 0, g]))
        rest = [math.exp(float(q @ gate["k_base"][head, 0, m].double()) / math.sqrt(rank)) for m in range(sinks)]
        shares.append(own / (own + sum(rest)))
    return sum(shares) / groups


def test_fast_kvzip_is_its_gate(tmp_path: Path) -> None:
    path = gate_file(tmp_path / "q2_dim8_sink3.pt", 3, 2, 2, 64)
    known = published("fast-kvzip", zoo.model("llama"), path)
    for index in range(3):
        got = FastKVzip().token_stats(HIDDEN, known.tensors[index])["fast_kvzip"]
        gate = {name.removeprefix(PREFIX): x for name, x in known.tensors[index].items()}
        wanted = [[[naive_gate(gate, HIDDEN[b, t].double(), h) for t in range(5)] for h in range(2)] for b in range(2)]
        assert_close(got.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_weights_of_half_precision_are_used_as_they_are(tmp_path: Path) -> None:
    folder = kvzap_files(tmp_path, 3, 2, 64, 7)
    save_file(
        {n: x.bfloat16() for n, x in load_file(folder / "model.safetensors").items()}, folder / "model.safetensors"
    )
    known = published("kvzap", zoo.model("llama"), folder)
    known.save(tmp_path / "made.safetensors")
    again = Calibration.load(tmp_path / "made.safetensors")
    assert again.tensors[0][INNER].dtype == torch.bfloat16 and again.digest == known.digest
    for hidden in (HIDDEN, HIDDEN.bfloat16()):
        got = KVzap().token_stats(hidden, again.tensors[0])["kvzap"]
        wide = {name: x.float() for name, x in again.tensors[0].items()}
        assert_close(got, KVzap().token_stats(HIDDEN, wide)["kvzap"], rtol=0.05, atol=0.02)


def test_other_layers_than_those_of_the_cache_are_left_out(tmp_path: Path) -> None:
    """Gemma: every other layer has a window and is not compressed; files have all layers, or those alone."""
    model = zoo.model("gemma3")
    layers, heads, _, width = shape_of(model)
    every = published("kvzap", model, kvzap_files(tmp_path / "all", layers, heads, width))
    some = published("kvzap", model, kvzap_files(tmp_path / "some", 2, heads, width))
    held = load_file(tmp_path / "all" / "model.safetensors")
    assert list(every.tensors) == list(some.tensors) == [1, 3]
    assert torch.equal(every.tensors[3][WEIGHT], held["layers.3.weight"])
    own = load_file(tmp_path / "some" / "model.safetensors")
    assert torch.equal(some.tensors[3][BIAS], own["layers.1.bias"])


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    model = zoo.model("llama")

    def refused(kind: str, path: Path, match: str) -> None:
        with pytest.raises(CalibrationError, match=match) as told:
            published(kind, model, path)
        assert "\n" not in str(told.value)

    refused(
        "kvzap", kvzap_files(tmp_path / "a", 4, 8, 96), "kvzap weights of 4 layers, 8 KV heads and hidden states of 96"
    )
    refused("kvzap", kvzap_files(tmp_path / "b", 2, 2, 64), "weights of 2 layers, .* LlamaForCausalLM has 3, 2 and 64")
    refused("kvzap", tmp_path / "nowhere", "cannot read .*nowhere.*no such file")
    save_file({"model.embed.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    refused("kvzap", tmp_path / "other.safetensors", "not a KVzap model .* it has tensor 'model.embed.weight'")
    save_file({"layers.0.weight": torch.ones(2, 64)}, tmp_path / "half.safetensors")
    refused("kvzap", tmp_path / "half.safetensors", "it has layers of kvzap_weight")
    save_file({"layers.0.weight": torch.ones(2, 64), "layers.0.bias": torch.ones(3)}, tmp_path / "odd.safetensors")
    refused("kvzap", tmp_path / "odd.safetensors", "do not fit together")
    refused("fast-kvzip", gate_file(tmp_path / "g.pt", 3, 4, 1, 64), "3 layers, 4 KV heads and hidden states of 64")
    torch.save({"model": []}, tmp_path / "empty.pt")
    refused("fast-kvzip", tmp_path / "empty.pt", "no list of gates under 'module'")
    torch.save({"module": [{"weight": torch.ones(2)}]}, tmp_path / "gate.pt")
    refused("fast-kvzip", tmp_path / "gate.pt", "a gate of weight")
    torch.save({"module": [print]}, tmp_path / "code.pt")
    refused("fast-kvzip", tmp_path / "code.pt", "cannot read .*Weights only load failed")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "g.pt").read_bytes()[:500])
    refused("fast-kvzip", tmp_path / "cut.pt", "cannot read")


def test_a_calibration_of_another_model_or_width_is_refused(tmp_path: Path) -> None:
    known = kvzap(tmp_path)
    with pytest.raises(CalibrationError, match="made for another model"):
        keepkv.Cache(zoo.model("qwen3"), "kvzap", 24, calibration=known)
    short = {i: {**x, WEIGHT: x[WEIGHT][:, 1:]} for i, x in known.tensors.items()}
    wrong = Calibration("kvzap", short, known.fingerprint, known.made_with)
    cache = keepkv.Cache(zoo.model("llama"), "kvzap", 24, calibration=wrong)
    with torch.no_grad(), pytest.raises(CalibrationError, match="kvzap weights for hidden states of 63 numbers"):
        zoo.model("llama")(**batch(), **{CACHE: cache})


def test_what_is_fitted_foretells_the_second_reading() -> None:
    """On the embedded model, held-out text: the fit says most of ln KVzip+, and kvzap keeps what kvzip keeps."""
    path = keepkv.embedded_model()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    pieces = batches(AutoTokenizer.from_pretrained(path), [document()], 6000, 256)
    known = calibrate("kvzap", model, pieces[:-1])
    shares = sorted(x for heads in known.made_with["found"]["foretold"].values() for x in heads)
    assert shares[len(shares) // 2] > 0.25, shares  # the small model's gates: .29
    both, ids = [], pieces[-1]
    for name, more in (("kvzip", {"plus": True, "allocate": "pooled"}), ("kvzap", {"calibration": known, "window": 0})):
        cache = keepkv.Cache(model, name, 0.4, when=keepkv.When("deferred"), **more)
        with torch.no_grad():
            model(ids, **{CACHE: cache})
        if name == "kvzip":
            keepkv.reread(model, cache, ids)
        cache.compress()
        views = [layer.store.view() for layer in cache.compressible]
        both.append({(i, h, int(p)) for i, x in enumerate(views) for h in range(x.shape[1]) for p in x.positions[0, h]})
    common = len(both[0] & both[1]) / len(both[0])
    assert common > 0.55, common  # by chance .4


def test_what_cannot_be_fitted_is_refused() -> None:
    model, ids = zoo.model("llama"), torch.randint(3, zoo.VOCAB, (3, 1, 40))
    with pytest.raises(CalibrationError, match="kvzap needs at least 5 texts of more than 8 tokens, 3 were given"):
        calibrate("kvzap", model, ids)
    with pytest.raises(CalibrationError, match="give a positive number"):
        calibrate("kvzap", model, ids, noise=0.0)
    more = torch.randint(3, zoo.VOCAB, (6, 1, 40))
    with pytest.raises(UnsupportedModel, match="its values are latents"):
        calibrate("kvzap", zoo.model("deepseek-v3"), more)
    assert calibrate("kvzap", zoo.model("deepseek-v3"), more, plus=False).tensors[0][WEIGHT].shape == (1, 64)
