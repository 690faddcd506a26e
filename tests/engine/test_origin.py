"""A cache file belongs to the model that filled the cache: its shape, settings, adapters and weights."""

from __future__ import annotations

import copy
import gc
import pickle
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
import zoo
from running import batch, generate, row

import keepkv
from keepkv.engine.files import origin
from keepkv.engine.versions import CACHE
from keepkv.errors import CacheFileError, CacheStateError

BASE = {**zoo._BASE, "head_dim": 16}
SLIDING, FULL = "sliding_attention", "full_attention"


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return t.LlamaForCausalLM(t.LlamaConfig(**{**BASE, **changes})).eval()


def gemma(types: list[str]) -> Any:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": len(types), "sliding_window": 16, "layer_types": types}
    return t.Gemma3ForCausalLM(t.Gemma3TextConfig(**{**BASE, **sizes})).eval()


ALIVE: list[Any] = []


def filled(model: Any, **options: Any) -> keepkv.Cache:
    ALIVE.append(model)  # or its weights could not be read when the cache is saved
    cache = keepkv.Cache(model, "snapkv", 14, window=4, sinks=2, **options)
    generate(model, row(batch(), 0), cache)
    return cache


def other_weights() -> Any:
    model = llama()
    model.model.layers[2].self_attn.k_proj.weight.data.mul_(1.5)
    return model


OTHERS = {
    "weights": other_weights,
    "rope_parameters": lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "rms_norm_eps": lambda: llama(rms_norm_eps=1e-3),
    "attention_bias": lambda: llama(attention_bias=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_in_another_state_is_refused_or_told(tmp_path: Path, name: str) -> None:
    """Before, each was loaded without a word, and answered."""
    path, other = tmp_path / "c", OTHERS[name]()
    filled(llama()).save(path)
    with pytest.raises(CacheFileError, match=rf"differ in .*'{name}'.*strict=False"):
        keepkv.Cache.load(path, other)
    with pytest.warns(UserWarning, match=rf"another model.*'{name}'") as told:
        loaded = keepkv.Cache.load(path, other, strict=False)
    assert {warning.filename for warning in told} == {__file__}
    with torch.no_grad():
        assert other(torch.tensor([[7]]), **{CACHE: loaded}).logits.isfinite().all()


@pytest.mark.parametrize(
    ("mine", "other", "name"),
    [
        (llama, lambda: llama(head_dim=32), "head_dim"),
        (llama, lambda: llama(num_key_value_heads=4), "num_key_value_heads"),
        (llama, lambda: llama().to(torch.bfloat16), "dtype"),
        (lambda: gemma([SLIDING, FULL]), lambda: gemma([FULL, SLIDING]), "layer_types"),
        (lambda: gemma([SLIDING, FULL]), lambda: gemma([FULL, FULL]), "layer_types"),
    ],
    ids=["head_dim", "kv heads", "dtype", "layers", "more full layers"],
)
def test_a_model_of_another_shape_is_always_refused(tmp_path: Path, mine: Any, other: Any, name: str) -> None:
    """Before, these were errors of torch and of dictionaries, at load or at the next forward."""
    path = tmp_path / "c"
    filled(mine()).save(path)
    for strict in (True, False):
        with pytest.raises(CacheFileError, match=rf"saved from another model.*'{name}'"):
            keepkv.Cache.load(path, other(), strict=strict)


class Adapted(torch.nn.Module):
    """A layer as PEFT wraps it."""

    active_adapters = ("legal",)
    disable_adapters = False

    def __init__(self, base_layer: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.lora_A = base_layer, torch.nn.Linear(base_layer.in_features, base_layer.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + (0 if self.disable_adapters else self.lora_A(x))


def test_adapters_are_told_apart(tmp_path: Path) -> None:
    """Those that were active when the cache was made; a cache with and one without were taken for each other."""
    path, model = tmp_path / "c", llama()
    attention = model.model.layers[0].self_attn
    bare = attention.q_proj
    attention.q_proj = adapted = Adapted(bare)
    cache = filled(model)
    cache.save(path)
    assert keepkv.Cache.load(path, model).report() == cache.report()
    adapted.disable_adapters = True
    with pytest.raises(CacheFileError, match=r"'adapters': \(\['legal'\], \[\]\)"):
        keepkv.Cache.load(path, model)
    with pytest.raises(CacheStateError, match=r"made with the adapters \['legal'\].*save it while"):
        cache.save(path)
    filled(model).save(path)
    adapted.disable_adapters = False
    with pytest.raises(CacheFileError, match="adapters"):
        keepkv.Cache.load(path, model)
    attention.q_proj = bare
    with pytest.raises(CacheFileError, match="weights"):  # a base that has no adapters has other parameters
        keepkv.Cache.load(path, model)


def test_weights_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    """Offloaded models keep parameters on "meta"; what is in memory is compared all the same."""
    model, path = llama(), tmp_path / "c"
    filled(model).save(path)
    model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(torch.empty(64, 64, device="meta"))
    with pytest.warns(UserWarning, match=r"not compared with the model: weights: layers\.1\.mlp.* not in memory"):
        keepkv.Cache.load(path, model)
    model.config.rms_norm_eps = 1e-3
    with pytest.raises(CacheFileError, match="rms_norm_eps"):
        keepkv.Cache.load(path, model)


def test_a_cache_does_not_keep_its_model_alive_and_says_when_it_is_gone(tmp_path: Path) -> None:
    model, path = llama(), tmp_path / "c"
    cache = filled(model)
    pickled = pickle.dumps(cache)  # which takes the facts with it
    ALIVE.clear()
    del model
    gc.collect()
    cache.save(path)
    with pytest.warns(UserWarning, match="weights: the model was gone"):
        keepkv.Cache.load(path, llama())
    with pytest.raises(CacheFileError, match="rms_norm_eps"):
        keepkv.Cache.load(path, llama(rms_norm_eps=1e-3))
    pickle.loads(pickled).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keepkv.Cache.load(path, llama())
    with pytest.raises(CacheFileError, match="weights"):
        keepkv.Cache.load(path, other_weights())


def test_weights_are_those_of_the_moment_of_saving(tmp_path: Path) -> None:
    model, path = llama(), tmp_path / "c"
    cache = filled(model)
    model.model.layers[0].mlp.up_proj.weight.data.add_(1)
    cache.save(path)
    assert keepkv.Cache.load(path, model).report() == cache.report()


def test_facts_of_a_large_model_take_milliseconds() -> None:
    """Of 1.1 billion parameters; only a few numbers of each are read."""
    with torch.device("meta"):
        config = t.LlamaConfig(num_hidden_layers=24, hidden_size=2048, intermediate_size=5632, vocab_size=32_000)
        model = t.LlamaForCausalLM(config)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:  # one number behind every weight
                module._parameters[name] = torch.nn.Parameter(torch.zeros(()).expand(parameter.shape))
    began = time.perf_counter()
    assert origin.facts(model)["weights"]
    assert time.perf_counter() - began < 3


def test_copies_share_where_they_come_from() -> None:
    model = llama()
    cache = filled(model)
    assert cache.copy().origin is cache.origin and copy.deepcopy(cache).origin is cache.origin
