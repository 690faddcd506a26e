"""ThinK: which channels of keys go, against a loop over queries and keys, and that their bytes do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from running import batch, generate, row
from torch import Tensor

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.errors import KeepKVError, UnsupportedModel
from keepkv.store import CODECS

LENGTHS = (150, 90, 40)


def read(arch: str, inputs: dict[str, Tensor], **options: Any) -> tuple[keepkv.Cache, list[Tensor]]:
    """A cache that holds every token of ``inputs``, and the queries (B,Hq,T,D) of each layer."""
    cache = keepkv.Cache(zoo.model(arch), "full", codec="think", codec_options=options)
    queries = []
    for layer in cache.compressible:

        def watched(module: Any, query: Tensor, *args: Any, attend: Any = layer.attend, **kwargs: Any) -> Tensor:
            queries.append(query)
            return attend(module, query, *args, **kwargs)

        layer.attend = watched  # type: ignore[method-assign]
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        zoo.model(arch)(**inputs, position_ids=positions, **{CACHE: cache})
    return cache, queries


@pytest.mark.parametrize("arch", ["llama", "gpt-oss", "gpt-neox"])  # grouped heads, sinks and windows, partial RoPE
@pytest.mark.parametrize("pruned, window", [(0.4, 32), (0.75, 5)])
def test_the_channels_that_go_are_those_of_the_loop(arch: str, pruned: float, window: int) -> None:
    inputs = batch(LENGTHS)
    plain = keepkv.Cache(zoo.model(arch), "full")
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        zoo.model(arch)(**inputs, position_ids=positions, **{CACHE: plain})
    cache, queries = read(arch, inputs, pruned=pruned, window=window)
    for mine, whole, asked in zip(cache.compressible, plain.compressible, queries, strict=True):
        got, given = mine.store.view(), whole.store.view()
        heads, width = given.shape[1], given.keys.shape[-1]
        g = asked.shape[1] // heads
        for b, length in enumerate(LENGTHS):
            written = max(LENGTHS) - 32
            for h in range(heads):
                keys = given.keys[b, h, max(LENGTHS) - length :].double()
                old = keys[: length - 32]
                if not len(old):
                    continue
                worth = []
                for d in range(width):
                    q = [float(x) ** 2 for head in range(h * g, (h + 1) * g) for x in asked[b, head, -window:, d]]
                    worth.append(sum(q) * sum(float(x) ** 2 for x in old[:, d]))
                gone = sorted(range(width), key=lambda d: worth[d])[: int(pruned * width)]
                kept = [d for d in range(width) if d not in gone]
                mine_keys = got.keys[b, h, max(LENGTHS) - length :]
                assert torch.equal(mine_keys[: length - 32][:, kept].double(), old[:, kept])
                assert bool((mine_keys[: length - 32][:, gone] == 0).all())
                assert torch.equal(got.keys[b, h, written:], given.keys[b, h, written:])  # the newest are whole
        assert torch.equal(got.values * got.valid[..., None], given.values * given.valid[..., None])


def test_their_bytes_are_freed() -> None:
    inputs = row(batch((600,)), 0)
    full = keepkv.Cache(zoo.model("llama"), "full")
    with torch.no_grad():
        zoo.model("llama")(**inputs, **{CACHE: full})
    for pruned, kept in ((0.5, 8), (0.75, 4)):
        cache, _ = read("llama", inputs, pruned=pruned)
        for mine, whole in zip(cache.compressible, full.compressible, strict=True):
            assert mine.store.coded.fields["keys"].shape == (1, 2, 568, kept)
            assert whole.store.nbytes - mine.store.nbytes > 0.95 * 568 * 2 * (16 - kept) * 4


@pytest.mark.parametrize("method", ["snapkv", "adakv", "keepkv", "streaming-llm"])
def test_any_method_combines_with_it(method: str) -> None:
    """A row of a batch, and alone, with compressions while decoding: the same tokens, the same channels."""
    model, inputs = zoo.model("llama"), batch((90, 60))
    options: dict[str, Any] = {"sinks": 2, "window": 4} if method != "streaming-llm" else {"sinks": 2}
    options |= {"codec": "think", "when": keepkv.When(every=8)}
    together = keepkv.Cache(model, method, 40, **options)
    out = generate(model, inputs, together, new=20)
    for i in range(2):
        alone = keepkv.Cache(model, method, 40, **options)
        own = generate(model, row(inputs, i), alone, new=20)
        assert torch.allclose(out.scores_[i], own.scores_[0], atol=1e-4)
    assert together.report().compressed and together.report().codec == "think"


def test_queries_decide_and_not_keys_alone() -> None:
    """A channel that keys are large in and queries never ask for goes; without queries it stays."""
    codec: Any = CODECS.build("think", pruned=0.5)
    keys = torch.randn(1, 1, 50, 8, generator=torch.Generator().manual_seed(0))
    keys[..., 2] *= 10
    queries = torch.randn(1, 1, 2, 40, 8, generator=torch.Generator().manual_seed(1))
    queries[..., 2] = 1e-4
    positions, valid = torch.arange(40)[None], torch.ones(1, 1, 50, dtype=torch.bool)
    blind = codec.learn(keys, keys, valid, {})
    seeing = codec.learn(keys, keys, valid, codec.meet(queries, positions, {}))
    assert int(blind["channels"][0, 0, 0, 2]) == 1 and int(seeing["channels"][0, 0, 0, 2]) == 0
    # What was chosen stands, whatever is asked or written later.
    later = codec.learn(keys.flip(-1), keys, valid, codec.meet(queries.flip(-1), positions, seeing))
    assert torch.equal(later["channels"], seeing["channels"])


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="caches one latent for keys and values"):
        keepkv.Cache(zoo.model("deepseek-v3"), "snapkv", 40, codec="think")
    for pruned in (0.0, 1.0, "half"):
        with pytest.raises(KeepKVError, match="pruned"):
            keepkv.Cache(zoo.model("llama"), "snapkv", 40, codec="think", codec_options={"pruned": pruned})


def test_a_file_that_says_nothing_of_channels_is_refused() -> None:
    codec: Any = CODECS.build("think")
    mask = torch.zeros(1, 2, 1, 10, dtype=torch.uint8)
    for wrong in ({}, {"channels": mask + 2}, {"channels": mask + 1}):
        with pytest.raises(ValueError, match="channels"):
            codec.check({}, wrong)
    mask[..., :6] = 1
    codec.check({}, {"channels": mask})
