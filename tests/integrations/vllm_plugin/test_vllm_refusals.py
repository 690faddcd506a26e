"""What an engine cannot do beside compression is refused at start; versions that were not tried are said."""

import warnings
from types import SimpleNamespace as Config
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import nn

from keepkv.errors import KeepKVError
from keepkv.integrations.vllm.refuse import check_any, check_config, check_layers
from keepkv.integrations.vllm.rope import rope_of
from keepkv.integrations.vllm.versions import check_version, config_of_caller


def config(**parts: dict[str, Any]) -> Config:
    """A configuration of vLLM as far as it is looked at, of an engine that keepkv can run in."""
    usual: dict[str, dict[str, Any]] = {
        "parallel_config": {"worker_cls": "keepkv.integrations.vllm.cpu.KeepKVWorker", "tensor_parallel_size": 2},
        "scheduler_config": {"scheduler_cls": "keepkv.integrations.vllm.scheduler.KeepKVScheduler"},
        "cache_config": {"cache_dtype": "auto"},
        "model_config": {"runner_type": "generate", "use_mla": False, "is_encoder_decoder": False},
    }
    merged = {name: {**usual.get(name, {}), **parts.get(name, {})} for name in {*usual, *parts} if name != "top"}
    return Config(**{name: Config(**x) for name, x in merged.items()}, **parts.get("top", {}))


def test_an_engine_that_keepkv_can_run_in() -> None:
    check_config(config())
    check_config(config(cache_config={"cache_dtype": "bfloat16"}))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"top": {"speculative_config": Config()}}, "without --speculative-config"),
        ({"top": {"kv_transfer_config": Config()}}, "without --kv-transfer-config"),
        ({"cache_config": {"kv_offloading_size": 4.0}}, "without --kv-offloading-size"),
        ({"cache_config": {"cache_dtype": "fp8"}}, "--kv-cache-dtype auto"),
        ({"attention_config": {"hisparse_config": Config()}}, "HiSparse"),
        ({"parallel_config": {"decode_context_parallel_size": 2}}, "--tensor-parallel-size"),
        ({"parallel_config": {"prefill_context_parallel_size": 2}}, "--tensor-parallel-size"),
        ({"parallel_config": {"pipeline_parallel_size": 2}}, "--tensor-parallel-size"),
        ({"parallel_config": {"enable_dbo": True}}, "without --enable-dbo"),
        ({"model_config": {"runner_type": "pooling"}}, "pooling model"),
        ({"model_config": {"is_encoder_decoder": True}}, "encoder-decoder"),
        ({"model_config": {"use_mla": True}}, "keepkv.Cache"),
        ({"parallel_config": {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}}, "belong together"),
        ({"scheduler_config": {"scheduler_cls": None}}, "belong together"),
    ],
)
def test_what_cannot_go_together_is_refused_with_the_remedy(parts: dict[str, Any], said: str) -> None:
    with pytest.raises(KeepKVError, match=said):
        check_config(config(**parts))


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (Config(kv_sharing_target_layer_name="a", impl=Config()), "share their caches"),
        (Config(impl=Config(alibi_slopes=[1.0])), "ALiBi"),
        (Config(impl=Config(alibi_slopes=None, sliding_window=128)), "hybrid cache manager"),
    ],
)
def test_attention_that_compressed_slots_cannot_serve(layer: Any, said: str) -> None:
    plain = Config(impl=Config(alibi_slopes=None, sliding_window=-1))
    check_layers([("a", plain), ("windowed", Config(impl=Config(sliding_window=8)))], {"a"})
    with pytest.raises(KeepKVError, match=said):
        check_layers([("a", plain), ("b", layer)], {"a", "b"})


def test_a_model_without_layers_to_compress() -> None:
    with pytest.raises(KeepKVError, match="engine_args"):
        check_any([])


# --- rotations ----------------------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """As vLLM's: a table of cosines and sines by position. bend: angles that do not grow with the position."""

    def __init__(self, scaling: float = 1.0, bend: float = 0.0, neox: bool = True) -> None:
        super().__init__()
        self.base, self.is_neox_style = 10_000.0, neox
        self._scaling, self._bend = scaling, bend

    def _compute_inv_freq(self, base: float) -> torch.Tensor:
        return 1.0 / base ** (torch.arange(0, 16, 2).float() / 16)

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        at = torch.arange(256).float()
        angle = torch.outer(at, self._compute_inv_freq(self.base)) + self._bend * at[:, None].square()
        return torch.cat((angle.cos(), angle.sin()), dim=-1) * self._scaling


def model(attention: nn.Module) -> nn.Module:
    made = nn.Module()
    made.layer = nn.Module()
    made.layer.self_attn = attention
    return made


def attention(**modules: Any) -> nn.Module:
    made = nn.Module()
    for name, module in modules.items():
        setattr(made, name, module)
    return made


@pytest.mark.parametrize("scaling", [1.0, 1.3])
@pytest.mark.parametrize("neox", [True, False])
def test_a_rotation_is_read_off_the_table(scaling: float, neox: bool) -> None:
    rotary = Rotary(scaling, neox=neox)
    rope, reason = rope_of(model(attention(rotary_emb=rotary)), "layer.self_attn.attn")
    assert reason is None and rope is not None
    assert rope.scaling == pytest.approx(scaling) and rope.interleaved == (not neox)
    assert torch.equal(rope.inv_freq, rotary._compute_inv_freq(rotary.base))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (attention(rotary_emb=Rotary(bend=1e-3)), "grows with the position"),
        (attention(), "no rotary_emb"),
        (attention(rotary_emb=Rotary(), use_rope=True), "some layers only"),
        (attention(rotary_emb=nn.Identity()), "no table"),
    ],
)
def test_a_rotation_that_is_not_known(made: nn.Module, said: str) -> None:
    rope, reason = rope_of(model(made), "layer.self_attn.attn")
    assert rope is None and reason is not None and said in reason


def test_a_layer_without_rotation() -> None:
    assert rope_of(model(attention(rotary_emb=None)), "layer.self_attn.attn") == (None, None)


# --- versions ----------------------------------------------------------------------------------------------------


def test_a_version_that_was_not_tried_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_version(Version("0.32.1"))
        check_version(Version("0.33.0"))
    with pytest.warns(UserWarning, match="make test-vllm"):
        check_version(Version("0.41.0"))


def test_the_configuration_of_whoever_has_a_request_checked() -> None:
    class InputProcessor:
        vllm_config = "this one"

        def ask(self) -> Any:
            return config_of_caller()

    assert config_of_caller() is None and InputProcessor().ask() == "this one"


# --- engines ----------------------------------------------------------------------------------------------------


def test_an_engine_without_keepkv_is_as_it_was_and_refuses_what_it_would_not_do(
    checkpoint: str, reference: Any
) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm_engine import Engine, Request

    plain = Engine(checkpoint)
    try:
        spec = plain.scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec
        assert type(spec).__name__ == "FullAttentionSpec", "an engine that does not use keepkv pays nothing"
        assert plain.replies([Request(300)]) == [reference.reply(Request(300))]
        with pytest.raises(VLLMValidationError, match="would run the request uncompressed"):
            plain.replies([Request(300, {"method": "snapkv", "budget": 0.25})])
    finally:
        plain.close()


def test_halves_and_bad_defaults_are_refused_at_start(checkpoint: str) -> None:
    from vllm_engine import Engine

    from keepkv.integrations.vllm import engine_args

    args = engine_args()
    for given in (
        {"worker_cls": args["worker_cls"]},
        {"scheduler_cls": args["scheduler_cls"]},
        {**args, "additional_config": {"keepkv": {"method": "kvzip", "budget": 0.5}}},
    ):
        with pytest.raises(KeepKVError):
            Engine(checkpoint, **given)


def test_what_only_the_engine_knows_ends_the_request(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotation that is not known, and a default that a request's budget does not go with."""
    from vllm_engine import Engine, Request

    from keepkv.integrations.vllm import engine_args, worker

    monkeypatch.setattr(worker, "rope_of", lambda model, name: (None, "it is odd"))
    engine = Engine(checkpoint, **engine_args())
    try:
        refused, shares, served = engine.replies(
            [
                Request(300, {"method": "keepkv2", "budget": 0.5}),
                Request(300, {"method": "per-layer", "budget": 0.5, "shares": [1, 2]}),
                Request(300, {"method": "snapkv", "budget": 0.5}),
            ]
        )
        assert len(refused) <= 1 and len(shares) <= 1 and len(served) == 40 and engine.used == 0, (
            "it ends after its first step"
        )
    finally:
        engine.close()
