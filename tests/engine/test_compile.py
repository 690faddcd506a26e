"""Compiled decode through the static store: one graph, no recompiles across compressions, the eager tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from running import batch, row
from transformers import CompileConfig

import keepkv
from keepkv.engine.versions import CACHE

NEW = 40
COMPILE = {"fullgraph": True, "dynamic": None}


def run(arch: str, method: str, options: dict[str, Any], compiled: bool) -> tuple[torch.Tensor, keepkv.Cache]:
    model, inputs = zoo.model(arch), row(batch((40,)), 0)
    cache = keepkv.Cache(model, method, 16, store="static", store_options={"capacity": 48}, **options)
    extra: dict[str, Any] = {"disable_compile": True}
    if compiled:
        config = CompileConfig(backend="eager", **COMPILE)  # type: ignore[arg-type]
        config._compile_all_devices = True
        extra = {"compile_config": config}
    out = model.generate(
        **inputs, **{CACHE: cache}, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **extra
    )  # fmt: skip
    return out, cache


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt-neox"])
@pytest.mark.parametrize("method", ["random", "keepkv", "selkv"])
def test_one_graph_over_decode_and_compressions(arch: str, method: str) -> None:
    options: dict[str, Any] = {"sinks": 2, "when": keepkv.When(every=12)}
    if method != "random":
        options["window"] = 4
    eager, _ = run(arch, method, options, compiled=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    out, cache = run(arch, method, options, compiled=True)
    assert torch.equal(out, eager)
    assert cache.report().compressions >= 3 * len(cache.compressible)  # after prefill, and twice more
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1, dict(counters["stats"])
    assert not counters["graph_break"], dict(counters["graph_break"])
    again, _ = run(arch, method, options, compiled=True)  # a fresh cache reuses the graph
    assert torch.equal(again, eager) and counters["stats"]["unique_graphs"] == 1
