"""Hidden states that attention is fed: what scores find of every token, on every architecture, and what is not kept."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import zoo
from running import batch, generate, row
from torch import Tensor
from transformers import CompileConfig, DynamicCache

import keepkv
from keepkv.core.slots import LayerView
from keepkv.core.stats import Stat
from keepkv.engine.latest import Latest
from keepkv.engine.layer import HELD, Layer
from keepkv.engine.model import attention_modules
from keepkv.engine.versions import CACHE
from keepkv.errors import KeepKVError, UnsupportedModel
from keepkv.integrations.vllm.served import check_method

SEEN: list[tuple[int, Tensor]] = []


def mark(hidden: Tensor) -> Tensor:
    """A number of each token (B,T)."""
    return (hidden.float() * torch.arange(1.0, hidden.shape[-1] + 1).cos()).sum(-1)


@dataclass(frozen=True)
class Marked(keepkv.Score):
    """A statistic of each token's hidden state, the same in each head but for its sign; keeps what is large."""

    heads: int = 2

    stats: ClassVar[dict[str, Stat]] = {"mark": Stat(float("-inf"), "anchor")}
    needs_hidden: ClassVar[bool] = True

    def token_stats(self, hidden: Tensor, calibration: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        sign = torch.tensor([1.0, -1.0] * self.heads)[: self.heads]
        return {"mark": mark(hidden)[:, None] * sign[:, None]}

    def __call__(self, view: LayerView) -> Tensor:
        return view.slots.stats["mark"]


@dataclass(frozen=True)
class Watching(keepkv.Score):
    """Keeps what it observes."""

    observes: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        assert view.hidden is not None and view.hidden.shape[:2] == view.query_positions.shape
        SEEN.append((view.layer, view.hidden[view.query_positions >= 0].clone()))
        view.state["watched"] = view.seen.clone()

    def __call__(self, view: LayerView) -> Tensor:
        return view.slots.positions.float()


def marked(arch: str, **fields: Any) -> keepkv.Method:
    return keepkv.Method(
        Marked({"deepseek-v3": 1, "gpt-neox": 4}.get(arch, 2)), name="marked", **{"sinks": 2, **fields}
    )


def fed(model: Any, ids: Tensor) -> dict[int, Tensor]:
    """What the attention modules of a copy of ``model`` are fed, (T,E) each, with transformers' attention and cache."""
    model, found = copy.deepcopy(model), {}
    cache = keepkv.Cache(model, "full")
    modules = attention_modules(model)
    del cache
    for index, module in modules.items():

        def watch(module: Any, args: Any, kwargs: Any, index: int = index) -> None:
            found[index] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[0]

        module.register_forward_pre_hook(watch, with_kwargs=True)
    with torch.no_grad():
        model(ids, **{CACHE: DynamicCache(config=model.config.get_text_config())})
    return found


@pytest.mark.parametrize("arch", list(zoo.ZOO))
def test_every_token_is_known_by_its_hidden_state(arch: str) -> None:
    """Rows of a padded batch, in chunks, and decoded tokens; in a layout of rectangles and of segments."""
    model, inputs = zoo.model(arch), batch((41, 23, 3))
    cache = keepkv.Cache(model, marked(arch), 1.0)
    chunks: dict[str, Any] = {} if arch == "qwen2-vl" else {"prefill_chunk_size": 16}
    out = generate(model, inputs, cache, new=4, **chunks)
    for i in range(3):
        own = row(inputs, i)["input_ids"]
        text = torch.cat((own, out.sequences[i : i + 1, 41:44]), dim=1)
        expected = fed(model, text)
        for layer in cache.compressible:
            slots = layer.store.view()
            for head in range(slots.shape[1]):
                held = slots.valid[i, head]
                assert slots.positions[i, head][held].tolist() == list(range(text.shape[1]))
                got = slots.stats["mark"][i, head][held] * (-1) ** head
                torch.testing.assert_close(got, mark(expected[layer.info.index]), rtol=1e-3, atol=1e-3)
    assert all(layer.hidden is None and layer.latest is None for layer in cache.compressible)


def test_it_is_what_keys_and_values_are_made_of() -> None:
    model, inputs = zoo.model("llama"), row(batch(), 0)
    SEEN.clear()
    cache = keepkv.Cache(model, keepkv.Method(Watching(), name="watching"), 1.0)
    generate(model, inputs, cache, new=1)
    for (rank, hidden), module in zip(SEEN, attention_modules(model).values(), strict=True):
        values = cache.compressible[rank].store.view().values[0].transpose(0, 1).flatten(1)
        torch.testing.assert_close(module.v_proj(hidden), values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "store, codec", [("dense", "none"), ("ragged", "none"), ("static", "none"), ("ragged", "int8")]
)
def test_the_choice_follows_it_through_layouts(store: str, codec: str) -> None:
    """Tokens that decode has compressed away and back into their layout have kept their numbers."""
    model, inputs = zoo.model("llama"), batch((41, 23))
    cache = keepkv.Cache(model, marked("llama", when=keepkv.When(every=3)), 16, store=store, codec=codec)
    out = generate(model, inputs, cache, new=9)
    assert cache.report().compressed
    expected = [
        fed(model, torch.cat((row(inputs, i)["input_ids"], out.sequences[i : i + 1, 41:49]), 1)) for i in (0, 1)
    ]
    first = cache.compressible[0]  # later ones have seen a compressed past
    slots = first.store.view()
    for i, by_layer in enumerate(expected):
        for head in range(2):
            held = slots.valid[i, head]
            wanted = mark(by_layer[first.info.index])[slots.positions[i, head][held].long()] * (-1) ** head
            torch.testing.assert_close(slots.stats["mark"][i, head][held], wanted, rtol=1e-3, atol=1e-3)


def test_taken_back_tokens_leave_no_trace() -> None:
    """Numbers of a token come and go with its slot: more can be taken back than what the score has not seen."""
    model, ids = zoo.model("llama"), torch.randint(3, zoo.VOCAB, (1, 30))
    caches = [keepkv.Cache(model, marked("llama", when=keepkv.When("deferred")), 1.0) for _ in range(2)]
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            model(token, **{CACHE: caches[0]})
        caches[0].crop(-12)
        model(ids[:, :18], **{CACHE: caches[1]})
    one, two = (cache.compressible[0].store.view() for cache in caches)
    torch.testing.assert_close(one.stats["mark"], two.stats["mark"], rtol=1e-3, atol=1e-3)


def test_nothing_is_held_between_forwards_but_what_the_score_has_still_to_see() -> None:
    model = zoo.model("llama")
    cache = keepkv.Cache(model, keepkv.Method(Watching(), name="watching", when=keepkv.When("deferred")), 1.0)
    with torch.no_grad():
        model(torch.randint(3, zoo.VOCAB, (1, HELD + 9)), **{CACHE: cache})
        assert all(layer.latest is None and layer.hidden is None for layer in cache.compressible)
        model(torch.randint(3, zoo.VOCAB, (1, 7)), **{CACHE: cache})
    for layer in cache.compressible:
        assert isinstance(layer.latest, Latest) and layer.latest.hidden is not None
        assert layer.latest.hidden.shape == (1, 7, 64) and layer.hidden is None
    cache.crop(-2)
    assert all(layer.latest.hidden.shape == (1, 5, 64) for layer in cache.compressible)  # type: ignore[union-attr]


def test_hooks_come_with_a_score_that_asks_and_go_with_the_last_cache() -> None:
    model = zoo.ZOO["llama"]().eval()
    modules = [module for module in model.modules() if hasattr(module, "layer_idx")]

    def hooked() -> int:
        return sum(len(module._forward_pre_hooks) for module in modules)

    plain = keepkv.Cache(model, "knorm", 1.0)
    assert hooked() == 0
    cache = keepkv.Cache(model, marked("llama"), 1.0)
    again = keepkv.Cache(model, marked("llama"), 1.0)
    assert hooked() == 3
    with torch.no_grad():  # a cache whose score does not ask leaves no trace of it
        model(torch.randint(3, zoo.VOCAB, (1, 9)), **{CACHE: plain})
    assert all(layer.hidden is None for layer in plain.compressible)
    del plain, cache, again
    assert hooked() == 0


def test_a_module_that_is_called_past_its_hooks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(zoo.model("llama"))
    cache = keepkv.Cache(model, marked("llama"), 1.0)
    module = model.model.layers[1].self_attn
    monkeypatch.setattr(type(module), "__call__", lambda self, *args, **kwargs: self.forward(*args, **kwargs))
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedModel, match="attention module of layer 0 is fed: it is called past"),
    ):
        model(torch.randint(3, zoo.VOCAB, (1, 9)), **{CACHE: cache})


def test_what_cannot_be_is_refused() -> None:
    model = zoo.model("llama")
    with pytest.raises(KeepKVError, match="looks at hidden states, which a serving engine does not hand"):
        check_method(marked("llama"))
    read = keepkv.Cache(model, "knorm", 1.0)
    with pytest.raises(
        KeepKVError, match="looks at hidden states, and this cache was made for 'knorm', which does not"
    ):
        read.copy(method=marked("llama"))
    merged = keepkv.Cache(model, "keepkv", 16, window=4, score=Marked())  # a score is passed on
    with torch.no_grad():
        model(torch.randint(3, zoo.VOCAB, (1, 40)), **{CACHE: merged})
    assert merged.report().compressed


def test_statistics_of_another_shape_or_name_are_refused() -> None:
    model, ids = zoo.model("llama"), torch.randint(3, zoo.VOCAB, (1, 9))
    expected = r"returned 'mark' of new tokens: \(1, 3, 9\) float32 on cpu: expected \(B,H,T\) = \(1, 2, 9\)"
    with torch.no_grad(), pytest.raises(KeepKVError, match=expected):
        model(ids, **{CACHE: keepkv.Cache(model, keepkv.Method(Marked(3), name="marked"), 1.0)})

    class Other(Marked):
        def token_stats(self, hidden: Tensor, calibration: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
            return {"other": mark(hidden)}

    with torch.no_grad(), pytest.raises(KeepKVError, match="of new tokens: expected some of mark"):
        model(ids, **{CACHE: keepkv.Cache(model, keepkv.Method(Other(), name="other"), 1.0)})


def test_decode_compiles_to_one_graph() -> None:
    model, inputs = zoo.model("llama"), row(batch((40,)), 0)

    def run(**extra: Any) -> tuple[Tensor, keepkv.Cache]:
        method = marked("llama", when=keepkv.When(every=12))
        cache = keepkv.Cache(model, method, 16, store="static", store_options={"capacity": 48})
        return model.generate(**inputs, **{CACHE: cache}, max_new_tokens=30, do_sample=False, **extra), cache

    eager, one = run(disable_compile=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(backend="eager", fullgraph=True, dynamic=None)
    config._compile_all_devices = True
    compiled, two = run(compile_config=config)
    assert torch.equal(eager, compiled) and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for a, b in zip(one.compressible, two.compressible, strict=True):
        assert isinstance(a, Layer) and isinstance(b, Layer)
        torch.testing.assert_close(a.store.view().stats["mark"], b.store.view().stats["mark"])
