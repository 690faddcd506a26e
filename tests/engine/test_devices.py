"""Models whose weights are elsewhere until they are used, or split."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
import zoo
from running import batch, generate

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.errors import UnsupportedModel

INPUTS = batch((61, 33))
IN_MEMORY, ON_DISK = ("rotary_emb", "embed_tokens", "norm", "layers.0"), ("layers.1", "layers.2")
WAYS = ["cpu", "buffers", "disk", "device-map"]


def fresh(name: str) -> Any:
    torch.manual_seed(0)
    return zoo.ZOO[name]().eval()


def offloaded(way: str, name: str, folder: Path) -> Any:
    model = fresh(name)
    if way in ("cpu", "buffers"):
        return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=way == "buffers")
    if way == "disk":
        return accelerate.disk_offload(model, str(folder / "offload"), execution_device="cpu")
    model.save_pretrained(folder / "model")
    places = {"lm_head": "cpu", **{f"model.{x}": "cpu" for x in IN_MEMORY}, **{f"model.{x}": "disk" for x in ON_DISK}}
    return type(model).from_pretrained(folder / "model", device_map=places, offload_folder=folder / "offload").eval()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["snapkv", "keepkv2", "expected-attention", "compactor"])
def test_offloaded_models_are_compressed_as_others(way: str, method: str, tmp_path: Path) -> None:
    """Before, the last three were refused: "its layout could not be probed … Cannot copy out of meta tensor"."""
    options = {"window": 4, "sinks": 2} if method in ("snapkv", "keepkv2") else {}
    plain, model = fresh("llama"), offloaded(way, "llama", tmp_path)
    caches = [keepkv.Cache(x, method, 20, **options) for x in (plain, model)]
    one, two = (generate(x, INPUTS, cache) for x, cache in zip((plain, model), caches, strict=True))
    assert caches[1].report().compressed
    assert torch.allclose(one.scores_, two.scores_, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_caches_of_offloaded_models_are_loaded(way: str, tmp_path: Path) -> None:
    """Before: "Tensor.item() cannot be called on meta tensors", or tensors on a device that has none."""
    model = offloaded(way, "llama", tmp_path)
    cache = keepkv.Cache(model, "snapkv", 20, window=4, sinks=2)
    generate(model, INPUTS, cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = keepkv.Cache.load(tmp_path / "cache.safetensors", model)
    ids = torch.full((2, 1), 7)
    with torch.no_grad():
        one, two = (model(ids, attention_mask=x.attention_mask(1), **{CACHE: x}).logits for x in (cache, loaded))
    assert torch.equal(one, two)


@pytest.mark.parametrize("method", ["snapkv", "expected-attention"])
def test_latent_attention_of_offloaded_models(method: str, tmp_path: Path) -> None:
    """Its cache is read through a projection of the model; before: "Tensor on device meta is not on …"."""
    options = {"window": 4, "sinks": 2} if method == "snapkv" else {}
    plain, model = fresh("deepseek-v3"), offloaded("cpu", "deepseek-v3", tmp_path)
    one, two = (generate(x, INPUTS, keepkv.Cache(x, method, 20, **options)) for x in (plain, model))
    assert torch.allclose(one.scores_, two.scores_, atol=1e-5)


def test_layers_on_several_devices_are_refused() -> None:
    model = fresh("llama")
    model.model.layers[1].self_attn._hf_hook = SimpleNamespace(execution_device=torch.device("cuda", 1))
    with pytest.raises(UnsupportedModel, match="several devices"):
        keepkv.Cache(model, "knorm", 20)
    assert model.config._attn_implementation == "sdpa"


PROCESS = """
import sys, warnings, torch, torch.distributed as dist, transformers as t, keepkv
from keepkv.engine.versions import CACHE
torch.set_num_threads(1)
dist.init_process_group("gloo")
whole = t.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
part = t.AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto").eval()
ids = torch.randint(5, 100, (1, 60), generator=torch.Generator().manual_seed(0))
def logits(model, *args, **options):
    cache = keepkv.Cache(model, *args, **options)
    out = model.generate(ids, **{CACHE: cache}, max_new_tokens=4, do_sample=False, output_logits=True,
                         return_dict_in_generate=True)
    assert cache.report().compressed
    return torch.stack(out.logits)
for method in ("snapkv", "knorm", "keepkv", "expected-attention"):
    options = {"window": 4, "sinks": 2} if method in ("snapkv", "keepkv") else {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        split = logits(part, method, 20, **options)
    assert any("split over 2 processes" in str(x.message) for x in said), said
    off = (split - logits(whole, method, 20, **options)).abs().max().item()
    assert off < 1e-4, (method, off)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_that_split_each_layer(tmp_path: Path) -> None:
    """Tensor parallelism over gloo."""
    model = fresh("llama")
    for x in model.parameters():
        x.data.mul_(3 if x.dim() == 2 else 1)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "process.py").write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, str(tmp_path / "process.py"), str(tmp_path / "model")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
