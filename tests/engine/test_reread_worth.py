"""Second readings that weigh attention: KVzip+, KVgrad and KVCompose against a plain model, row by row."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import zoo
from running import batch, row
from score_views import row as one_row
from score_views import together
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache

import keepkv
from keepkv.engine.passes.reread import LEAD
from keepkv.engine.versions import CACHE
from keepkv.errors import UnsupportedModel
from keepkv.score.passes.kvcompose import KVCompose
from keepkv.score.passes.kvzip import STAT

LENGTHS = (41, 23, 3)
WEIGHTS = {"llama": "o_proj", "gpt-oss": "o_proj", "gpt-neox": "dense", "qwen3": "o_proj"}
CASES = [(kind, arch) for kind in ("plus", "kvgrad") for arch in WEIGHTS]
CASES += [("kvcompose", "llama"), ("kvcompose", "qwen3")]


@cache
def eager(name: str) -> Any:
    model = copy.deepcopy(zoo.model(name))
    model.set_attn_implementation("eager")
    return model


def expected(kind: str, name: str, ids: Tensor, chunk: int) -> dict[int, Tensor]:
    """(H,S) by layer: what each chunk that is read behind ``ids`` (S,) makes of its slots, by one forward of both."""
    model, size, found = eager(name), len(ids), {}
    decoder = model.get_decoder()
    modules = {i: getattr(x, "self_attn", None) or x.attention for i, x in enumerate(decoder.layers)}
    for start in range(0, size, chunk):
        text = torch.cat((ids, ids[max(0, start - LEAD) : start + chunk]))[None]
        fed, outs, values, last, hooks = {}, {}, {}, [], []
        for i, module in modules.items():

            def before(module: Any, args: Any, kwargs: Any, i: int = i, fed: Any = fed) -> None:
                fed[i] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

            def after(module: Any, args: Any, out: Any, i: int = i, outs: Any = outs) -> None:
                outs[i] = out[0]

            hooks += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
        hooks.append(decoder.layers[-1].register_forward_hook(lambda *given, last=last: last.append(given[2])))
        # The context is read first, as a cache holds it: no gradient flows through its keys and values.
        held = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            model(text[:, :size], **{CACHE: held})
            values = {i: held.layers[i].values.clone() for i in modules}
        last.clear()
        embedded = model.get_input_embeddings()(text[:, size:]).detach().requires_grad_()
        out = model(inputs_embeds=embedded, output_attentions=True, **{CACHE: held})
        h = last[0][0] if isinstance(last[0], tuple) else last[0]
        grads = torch.autograd.grad(h.square().sum(), [outs[i] for i in modules])
        for hook in hooks:
            hook.remove()
        for i, grad in zip(modules, grads, strict=True):
            a = out.attentions[i][0].detach()
            if a.shape[-1] != text.shape[1]:  # a layer with a window
                continue
            a, v = a[:, :, :size], values[i][0]
            g = a.shape[0] // v.shape[0]
            weight = getattr(modules[i], WEIGHTS[name]).weight.detach().double()  # (E, heads*Dv)
            made = torch.zeros(v.shape[0], size, dtype=torch.float64)
            for head in range(v.shape[0]):
                members = []
                for q in range(head * g, (head + 1) * g):
                    w = weight[:, q * v.shape[-1] : (q + 1) * v.shape[-1]]
                    norms = (v[head].double() @ w.T).norm(dim=-1)  # (S,)
                    per = {
                        "plus": norms[None] / fed[i][0].detach().double().norm(dim=-1)[:, None],
                        "kvgrad": norms[None] * grad[0].double().norm(dim=-1)[:, None],
                        "kvcompose": torch.ones(1, 1, dtype=torch.float64),
                    }[kind]
                    members.append(a[q].double() * per)
                every = torch.stack(members)  # (G,T,S)
                made[head] = (every.mean(0) if kind == "kvcompose" else every.amax(0)).amax(0)
            found[i] = torch.maximum(found[i], made) if i in found else made
    return found


@pytest.mark.parametrize("kind, arch", CASES)
@pytest.mark.parametrize("chunk", [2048, 16])
def test_the_statistic_against_a_plain_model(kind: str, arch: str, chunk: int) -> None:
    """Padded rows, grouped heads, sinks and windows between, chunks; the model has no gradients afterwards."""
    model, inputs = zoo.model(arch), batch(LENGTHS)
    name, more = ("kvzip", {"plus": True}) if kind == "plus" else (kind, {})
    mine = keepkv.Cache(model, name, 14, when=keepkv.When("deferred"), sinks=2, **more)
    with torch.no_grad():
        model(**inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0), **{CACHE: mine})
    keepkv.reread(model, mine, **inputs, chunk=chunk)
    for i, length in enumerate(LENGTHS):
        alone = expected(kind, arch, row(inputs, i)["input_ids"][0], chunk)
        for layer in mine.compressible:
            got = layer.store.view().stats[STAT][i, :, -length:].double()
            wanted = alone[layer.info.index]
            assert_close(got, wanted, rtol=2e-3, atol=1e-3 * float(wanted.max()))
    assert all(x.grad is None and x.requires_grad for x in model.parameters())


def test_gradients_are_taken_inside_inference_mode_too() -> None:
    model, ids = zoo.model("llama"), row(batch(), 0)["input_ids"]
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        mine = keepkv.Cache(model, "kvgrad", 14, when=keepkv.When("deferred"), sinks=2)
        with mode():
            model(ids, **{CACHE: mine})
            keepkv.reread(model, mine, ids, chunk=20)
            mine.compress()
        found.append(mine.kept_positions(1))
    assert torch.equal(*found) and mine.report().compressed


def test_only_a_second_reading_takes_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("keepkv.engine.passes.reread.sensitivities", lambda *given: asked.append(1) or [])
    model, ids = zoo.model("llama"), row(batch(), 0)["input_ids"]
    for name in ("kvzip", "kvcompose"):
        mine = keepkv.Cache(model, name, 14, when=keepkv.When("deferred"), sinks=2)
        with torch.no_grad():
            model(ids, **{CACHE: mine})
        keepkv.reread(model, mine, ids)
    assert not asked


def test_kvcompose_adds_what_the_other_heads_say() -> None:
    """Of the heads that still hold the token: against a loop, on slots that differ by head."""
    view = together([one_row(0), one_row(1, slots=9)])
    view.slots.stats[STAT] = torch.rand(view.slots.shape, generator=torch.Generator().manual_seed(0)).double()
    for missing in (None, (0, 1, 10)):
        if missing is not None:
            view.slots.positions[missing] = -1
        got, own = KVCompose()(view), view.slots.stats[STAT]
        for b, h, s in view.slots.valid.nonzero().tolist():
            at = view.slots.positions[b, h, s]
            said = [own[b, k, j] for k in range(2) for j in range(14) if view.slots.positions[b, k, j] == at]
            assert_close(got[b, h, s], own[b, h, s] + torch.stack(said).mean())


def test_what_cannot_be_read_is_refused() -> None:
    for name, more in (("kvgrad", {}), ("kvzip", {"plus": True})):
        with pytest.raises(UnsupportedModel, match="looks at the output projection"):
            keepkv.Cache(zoo.model("deepseek-v3"), name, 16, **more)
