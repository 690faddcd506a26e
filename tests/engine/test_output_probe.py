"""The output projection of attention, read off real model classes: what scores find in ``view.output``."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import zoo
from rotations import tiny
from torch import Tensor, nn

import keepkv
from keepkv.core.slots import LayerView
from keepkv.engine.cache import Cache
from keepkv.engine.model import attention_modules
from keepkv.engine.versions import CACHE
from keepkv.errors import CacheStateError, KeepKVError, UnsupportedModel
from keepkv.integrations.vllm.served import check_method
from keepkv.score.queries.remembering import Remembering

SEEN: list[LayerView] = []


@dataclass(frozen=True)
class Looking(keepkv.Score):
    """Keeps the views that it is asked to score."""

    needs_output: ClassVar[bool] = True

    def __call__(self, view: LayerView) -> Tensor:
        SEEN.append(view)
        return view.slots.values.float().norm(dim=-1)


LOOKING = keepkv.Method(Looking(), name="looking")


NAMES = ("o_proj", "dense", "c_proj", "out_proj")


def projected(model: Any) -> dict[int, tuple[Tensor, Tensor]]:
    """What the attention function returns in each layer of the next forward, and what the module makes of it without
    its bias; filled as it runs."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(index: int, module: nn.Module) -> None:
        def hook(module: Any, given: tuple[Tensor], out: Tensor) -> None:
            found.setdefault(index, (given[0], out if module.bias is None else out - module.bias))

        module.register_forward_hook(hook)

    for index, module in attention_modules(model).items():
        watch(index, next(child for name, child in module.named_modules() if name in NAMES))
    return found


@pytest.mark.filterwarnings("ignore:.*three dimensions")
@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_zoo(name: str) -> None:
    """The attention output times ``view.output`` is what the module itself returns, less its bias; or refused."""
    model = copy.deepcopy(zoo.model(name))
    rng = torch.get_rng_state()
    if name == "deepseek-v3":
        with pytest.raises(UnsupportedModel, match=r"'looking' looks at .* of layer 0 .*latents"):
            Cache(model, LOOKING, 8)
        return
    cache = Cache(model, LOOKING, 8)
    assert torch.equal(torch.get_rng_state(), rng), "the user's random numbers are not touched"
    check(model, cache)


@pytest.mark.parametrize("kind", ["GPT2", "OPT", "Phi", "Cohere2", "SmolLM3", "Granite"])
def test_other_names_and_layouts_of_the_weight(kind: str) -> None:
    model = tiny(kind, **{"OPT": {"ffn_dim": 64, "word_embed_proj_dim": 64}, "GPT2": {"n_layer": 4}}.get(kind, {}))
    check(model, Cache(model, LOOKING, 8))


def check(model: Any, cache: Cache) -> None:
    SEEN.clear()
    found = projected(model)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 23)[None], **{CACHE: cache})
        model(input_ids=torch.tensor([[7]]), **{CACHE: cache})  # layers that others share are compressed before it
    assert sorted(view.layer for view in SEEN) == list(range(len(cache.compressible))) != []
    for view in SEEN:
        index = cache.compressible[view.layer].info.index
        given, out = found[index]
        assert view.output is not None
        assert view.output.shape == (
            view.query_groups * view.slots.shape[1],
            view.slots.values.shape[-1],
            out.shape[-1],
        )
        by_head = given.unflatten(-1, view.output.shape[:2])
        torch.testing.assert_close(torch.einsum("bthd,hde->bte", by_head, view.output), out, atol=1e-5, rtol=1e-4)
        weights = {p.data_ptr() for p in attention_modules(model)[index].parameters()}
        assert view.output.data_ptr() in weights, "a view, no copy"


def test_what_stands_between_the_attention_and_the_weight_is_refused() -> None:
    class Gated(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 0.5)

    model = tiny("Llama")
    old = model.model.layers[1].self_attn.o_proj
    model.model.layers[1].self_attn.o_proj = gated = Gated(old.in_features, old.out_features, bias=False)
    with pytest.raises(UnsupportedModel, match=r"layer 1 of LlamaForCausalLM: .*no product"):
        Cache(model, LOOKING, 8)
    assert model.config._attn_implementation != "keepkv"
    gated.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.uint8), requires_grad=False)  # as codes are kept
    with pytest.raises(UnsupportedModel, match="layer 1 of LlamaForCausalLM"):
        Cache(model, LOOKING, 8)


def test_bfloat16_and_weights_that_change() -> None:
    """The weight is read when it is needed: one that an adapter was merged into since is the new one."""
    model = tiny("Llama").bfloat16()
    cache = Cache(model, LOOKING, 8)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(2)
    SEEN.clear()
    model(input_ids=torch.arange(3, 23)[None], **{CACHE: cache})
    weight = model.model.layers[0].self_attn.o_proj.weight
    assert SEEN[0].output is not None and torch.equal(SEEN[0].output.flatten(0, 1).T, weight)


def test_another_module_in_its_place_is_refused() -> None:
    """As where an adapter or quantised weights come while the cache lives; it goes on once the old one is back."""
    model = tiny("Llama")
    cache, ids = Cache(model, LOOKING, 8), torch.arange(3, 23)[None]
    attention = model.model.layers[1].self_attn
    old, attention.o_proj = attention.o_proj, nn.Linear(64, 64, bias=False)
    with pytest.raises(CacheStateError, match=r"'o_proj' of LlamaAttention, .* another module, Linear"):
        model(input_ids=ids, **{CACHE: cache})
    attention.o_proj = old
    cache.reset()
    model(input_ids=ids, **{CACHE: cache})
    assert cache.report().ratio < 1


def test_only_where_somebody_asks() -> None:
    model = tiny("Llama")
    plain = Cache(model, "snapkv", 40)
    assert all(layer.info.output is None for layer in plain.compressible)
    wrapped = Remembering(Looking(), 4)
    assert wrapped.needs_output and not Remembering(plain.settings.method.score, 4).needs_output
    model(input_ids=torch.arange(3, 23)[None], **{CACHE: plain})
    with pytest.raises(KeepKVError, match="looks at the output projection, and this cache was made for 'snapkv'"):
        plain.copy(method=LOOKING)
    with pytest.raises(KeepKVError, match="output projection"):
        check_method(LOOKING)


def test_pickles_hold_no_weights() -> None:
    model = tiny("Llama")
    cache = Cache(model, LOOKING, 8)
    read = pickle.loads(pickle.dumps(cache))
    assert cache.compressible[0].info.output is not None and read.compressible[0].info.output is not None
    assert len(pickle.dumps(cache)) < model.model.layers[0].self_attn.o_proj.weight.nbytes
    with pytest.raises(CacheStateError, match="pickle"):
        read.compressible[0].info.output(torch.device("cpu"))


def test_an_adapter_on_the_projection_is_refused_until_it_is_merged() -> None:
    peft = pytest.importorskip("peft")
    model = tiny("Llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False))
    with pytest.raises(UnsupportedModel, match=r"layer 0 of LlamaForCausalLM: .*no product"):
        Cache(wrapped, LOOKING, 8)
    merged = wrapped.merge_and_unload()
    check(merged, Cache(merged, LOOKING, 8))
