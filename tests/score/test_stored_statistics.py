"""Expected attention from a calibration: the same statistics as of a prompt, without observing it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from running import batch, generate
from torch import Tensor

import keepkv
from keepkv.calibrate import KINDS, calibrate
from keepkv.core.calibration import Calibration
from keepkv.core.when import When
from keepkv.engine.rope_probe import rope_of
from keepkv.engine.versions import CACHE
from keepkv.errors import CalibrationError, KeepKVError
from keepkv.score.base import SCORES
from keepkv.score.queries.expected import ExpectedAttention

KIND = "query-statistics"
STORED: dict[str, Any] = {"statistics": "stored"}
F64 = torch.float64


def gpt2() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=zoo.VOCAB, n_positions=256, n_embd=32, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config).eval()


def model_of(name: str) -> transformers.PreTrainedModel:
    return gpt2() if name == "gpt2" else zoo.model(name)


def texts(lengths: tuple[int, ...] = (40, 61, 61), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, zoo.VOCAB, (1, n), generator=generator) for n in lengths]


def queries_of(model: transformers.PreTrainedModel, ids: Tensor) -> dict[int, Tensor]:
    """Queries (H*G,T,D) of one text, after RoPE as attention gets them, by layer: what the cache's layers are given."""
    cache, found = keepkv.Cache(model, "full"), {}
    for layer in cache.compressible:
        attend = layer.attend

        def watched(module: Any, query: Tensor, *args: Any, attend: Any = attend, layer: Any = layer, **kw: Any) -> Any:
            found[layer.info.index] = query[0].double()
            return attend(module, query, *args, **kw)

        layer.attend = watched
    with torch.no_grad():
        model(input_ids=ids, **{CACHE: cache})
    return found


def matrix(rope: Any, position: int, d: int) -> Tensor:
    """The rotation at ``position`` as a matrix (D,D) float64; without RoPE the identity."""
    if rope is None:
        return torch.eye(d, dtype=F64)
    return rope.rotate(torch.eye(d, dtype=F64), torch.full((d,), position)).T


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", "gpt2"])
def test_moments_are_those_of_all_texts_in_float64(name: str) -> None:
    """Against mean and covariance over one list of all queries, each turned back by its own matrix. 1e-6 relative."""
    model, data = model_of(name), texts()
    with torch.no_grad():
        found = calibrate(KIND, model, data)
    ropes = rope_of(model)
    per_text = [queries_of(model, ids) for ids in data]
    assert found.tensors.keys() == per_text[0].keys()
    if name in ("gemma3", "gpt-oss"):  # sliding layers are not compressed and have no entry
        assert list(found.tensors) == [1, 3]
    for index, held in found.tensors.items():
        d = per_text[0][index].shape[-1]
        back = [torch.linalg.inv(matrix(ropes.get(index), p, d)).T for p in range(61)]
        rows = [x[index][:, p] @ back[p] for x in per_text for p in range(4, x[index].shape[1])]
        every = torch.stack(rows, dim=1)  # (H*G,N,D)
        mean = every.mean(1)
        away = every - mean[:, None]
        covariance = away.mT @ away / every.shape[1]
        assert held["query_count"] == every.shape[1] == 36 + 57 + 57
        for got, wanted in ((held["query_mean"], mean), (held["query_covariance"], covariance)):
            assert got.dtype == torch.float32 and got.shape == wanted.shape
            torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


def compressed(model: transformers.PreTrainedModel, ids: Tensor, **options: Any) -> keepkv.Cache:
    cache = keepkv.Cache(model, "expected-attention", 0.3, **options)
    with torch.no_grad():
        model(input_ids=ids, **{CACHE: cache})
    return cache


class Spy(ExpectedAttention):
    """Expected attention that remembers its scores."""

    seen: list[Tensor]

    def __call__(self, view: keepkv.LayerView) -> Tensor:
        scores = super().__call__(view)
        self.seen.append(scores)
        return scores


@pytest.mark.parametrize(
    "options", [{}, {"shrinkage": "auto"}, {"position_average": "moments", "use_covariance": False}]
)
@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek-v3", "gpt2"])
def test_stored_on_the_same_text_equals_observed(name: str, options: dict[str, Any]) -> None:
    """Scores within 1e-4 of the largest: what is observed adds up in float32, what is stored in float64."""
    model, [ids] = model_of(name), texts((61,))
    found = calibrate(KIND, model, [ids])
    scores = {}
    for how, given in (("prompt", None), ("stored", found)):
        spy = Spy(statistics=how, **options)
        object.__setattr__(spy, "seen", [])
        cache = keepkv.Cache(model, keepkv.Method(score=spy), 0.3, calibration=given)
        with torch.no_grad():
            model(input_ids=ids, **{CACHE: cache})
        scores[how] = spy.seen
        if how == "stored":
            assert not any(layer.score_state for layer in cache.compressible)  # nothing was observed
    assert len(scores["stored"]) == len(scores["prompt"]) > 0
    for got, wanted in zip(scores["stored"], scores["prompt"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_a_batch_with_padding_gives_what_each_row_gives_alone() -> None:
    model = zoo.model("llama")
    found, inputs = calibrate(KIND, model, texts()), batch((61, 33))
    cache = keepkv.Cache(model, "expected-attention", 16, statistics="stored", calibration=found)
    together = generate(model, inputs, cache).sequences[:, -6:]
    for i in range(2):
        real = inputs["attention_mask"][i].bool()
        alone = {name: x[i : i + 1, real] for name, x in inputs.items()}
        cache = keepkv.Cache(model, "expected-attention", 16, statistics="stored", calibration=found)
        assert torch.equal(generate(model, alone, cache).sequences[0, -6:], together[i])


def test_copies_recompress_with_it() -> None:
    model, [ids] = zoo.model("llama"), texts((61,))
    found = calibrate(KIND, model, texts(seed=1))
    options: dict[str, Any] = {"statistics": "stored", "calibration": found, "when": When(every=4)}
    cache = compressed(model, ids, **options)
    twin = cache.copy()
    for one in (cache, twin):
        with torch.no_grad():
            for token in (5, 6, 7, 8, 9):
                model(input_ids=torch.tensor([[token]]), **{CACHE: one})
    assert cache.report().to_dict()["compressions"] > 3
    for index in range(3):
        assert torch.equal(cache.kept_positions(index), twin.kept_positions(index))


def test_a_copy_for_a_method_that_needs_one_must_have_it() -> None:
    model, [ids] = zoo.model("llama"), texts((61,))
    found = calibrate(KIND, model, texts(seed=1))
    stored = keepkv.Method(score=ExpectedAttention(statistics="stored"))
    with pytest.raises(KeepKVError, match="needs a calibration"):
        compressed(model, ids, when=When("deferred")).copy(method=stored)
    twin = compressed(model, ids, statistics="stored", calibration=found, when=When("deferred")).copy(method=stored)
    twin.compress()
    assert torch.equal(twin.kept_positions(1), compressed(model, ids, **STORED, calibration=found).kept_positions(1))


def test_rows_join_only_with_the_same_calibration() -> None:
    model, [ids] = zoo.model("llama"), texts((61,))
    one, two = (calibrate(KIND, model, texts(seed=seed)) for seed in (1, 2))
    cache = compressed(model, ids, **STORED, calibration=one)
    with pytest.raises(KeepKVError, match="differ in calibration"):
        cache.join(compressed(model, ids, **STORED, calibration=two))
    cache.join(compressed(model, ids, **STORED, calibration=one))
    assert cache.batch_size == 2


def test_a_file_serves_as_well(tmp_path: Path) -> None:
    model, [ids] = zoo.model("llama"), texts((61,))
    found = calibrate(KIND, model, texts(seed=1))
    found.save(tmp_path / "q.safetensors")
    kept = [
        compressed(model, ids, statistics="stored", calibration=given).kept_positions(1)
        for given in (found, tmp_path / "q.safetensors")
    ]
    assert torch.equal(*kept)
    assert not torch.equal(kept[0], compressed(model, ids).kept_positions(1))


@pytest.mark.parametrize("method", ["expected-attention", "keepkv", "adakv"])
def test_without_a_calibration_it_is_refused_when_the_cache_is_made(method: str) -> None:
    score = ExpectedAttention(statistics="stored")
    options = {"statistics": "stored"} if method == "expected-attention" else {"score": score}
    with pytest.raises(CalibrationError, match="needs a calibration") as error:
        keepkv.Cache(zoo.model("llama"), method, 0.3, **options)
    assert "keepkv calibrate query-statistics --model MODEL --text FILE --out query-statistics.s" in str(error.value)


def test_one_that_nothing_uses_is_refused() -> None:
    found = calibrate(KIND, zoo.model("llama"), texts())
    with pytest.raises(CalibrationError, match="no part of the method uses it"):
        keepkv.Cache(zoo.model("llama"), "expected-attention", 0.3, calibration=found)


def test_other_weights_are_refused_with_the_command() -> None:
    found = calibrate(KIND, zoo.model("llama"), texts())
    other = copy.deepcopy(zoo.model("llama"))
    with torch.no_grad():
        other.model.layers[2].self_attn.k_proj.weight.mul_(1.05)
    other.config._name_or_path = "their/model"
    with pytest.raises(CalibrationError, match=r"weights \(") as error:
        keepkv.Cache(other, "expected-attention", 0.3, statistics="stored", calibration=found)
    assert "keepkv calibrate query-statistics --model their/model --text FILE" in str(error.value)


def test_a_view_by_hand_without_calibration_is_told_what_is_missing() -> None:
    from score_views import row

    with pytest.raises(CalibrationError, match="query_count, query_mean, query_covariance"):
        ExpectedAttention(statistics="stored")(row(0))
    with pytest.raises(KeepKVError, match="'prompt', 'stored'"):
        ExpectedAttention(statistics="offline")


def test_texts_shorter_than_the_sinks_are_refused() -> None:
    with pytest.raises(CalibrationError, match="longer texts"):
        calibrate(KIND, zoo.model("llama"), texts((4, 3)))


def test_a_model_with_nothing_to_compress_is_refused() -> None:
    config = copy.deepcopy(zoo.model("gemma3").config)
    config.layer_types = ["sliding_attention"] * 4
    with pytest.raises(CalibrationError, match="nothing to calibrate"), pytest.warns(UserWarning, match="nothing"):
        calibrate(KIND, transformers.Gemma3ForCausalLM(config).eval(), texts())


def test_the_record_says_what_was_read() -> None:
    model = zoo.model("llama")
    one, two = (calibrate(KIND, model, texts(seed=seed), command="as typed") for seed in (0, 1))
    assert one.made_with["tokens"] == 162 and one.made_with["command"] == "as typed"
    assert one.made_with["texts"] != two.made_with["texts"]
    assert one.fingerprint == two.fingerprint and isinstance(one, Calibration)


def test_every_kind_that_a_score_needs_can_be_made() -> None:
    pieces = [ExpectedAttention(statistics="stored"), *map(SCORES.build, SCORES)]
    assert {piece.needs_calibration for piece in pieces} - {None} <= set(KINDS)
