"""Every method of the registry is served from blocks as ``keepkv.Cache`` has it, or refused with what to do; needs no
vLLM."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import matrix
import pytest
import torch
from kernel_slots import needs_triton
from paged import Paged
from served_methods import REFUSED
from transformers import LlamaConfig, LlamaForCausalLM

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.errors import KeepKVError
from keepkv.integrations.vllm.wish import Wish, wish_of
from keepkv.methods import METHODS
from keepkv.methods.base import make_method
from keepkv.methods.presets import PRESETS

VOCABULARY, PROMPT, REPLY = 128, 110, 9
REMEDIES = ("Use ", "Choose ", "Leave ", "Give ", "Make one")


@cache
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.25,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@cache
def prompt(length: int = PROMPT) -> list[int]:
    made = torch.Generator().manual_seed(length)
    return torch.randint(0, VOCABULARY, (length,), generator=made).tolist()


def asked(name: str, budget: float | int, files: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The extra arguments of a request, and what the server was started with: the calibration that it needs, if any."""
    extra = {f"keepkv_{key}": x for key, x in {"method": name, "budget": budget, **options}.items()}
    known, file = matrix.calibration((name, options), model()), files / "calibration.safetensors"
    if known is None:
        return extra, {}
    known.save(file)
    return extra, {"calibration": str(file)}


def expected(wish: Wish, count: int) -> tuple[list[int], keepkv.Cache]:
    """The reply with a cache of transformers, and that cache."""
    settings = wish.settings
    known = list(settings.calibrations.values())
    made = keepkv.Cache(model(), wish.method, wish.budget, seed=settings.seed, calibration=known)
    ids = torch.tensor([prompt()])
    out = model().generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None,
        pad_token_id=0, **{CACHE: made},
    )  # fmt: skip
    return out[0, ids.shape[1] :].tolist(), made


def check(
    extra: dict[str, Any], default: dict[str, Any], chunks: tuple[int, ...] = (64, 45), lost_after: tuple[int, ...] = ()
) -> None:
    """The same tokens as a cache says, and the same tokens of the text in every head at the end, but for one that
    rounding may decide: some scores are sums of large numbers of both signs."""
    wish = wish_of(extra, default)
    assert wish is not None
    said, held = expected(wish, REPLY)
    paged = Paged(model(), calibrations=wish.settings.calibrations, default=default)
    assert paged.reply(prompt(), extra, REPLY, chunks, lost_after) == said
    apart = 0
    for layer, mine in zip(held.layers, paged.positions, strict=True):
        for own, other in zip(mine, layer.store.view().positions[0], strict=True):
            apart += len(set(own[own >= 0].tolist()) ^ set(other[other >= 0].tolist()))
    assert apart <= 2


NAMES = [name for name in (*METHODS, *PRESETS) if name != "full"]


def observing() -> list[Any]:
    """Methods whose scores look at queries, of which some make no difference between the tokens of a reply."""
    one_by_one = ("keepkv", "h2o", "g-kv", "zeromerge")
    found = (name for name in NAMES if name not in REFUSED and make_method(name, {}).score.observes)
    return [pytest.param(name, marks=[] if name in one_by_one else pytest.mark.slow) for name in found]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_a_method_that_is_served_says_what_a_cache_says(name: str, tmp_path: Path) -> None:
    """A prompt whose last chunk is one token, and a reply that is compressed on its way."""
    check(*asked(name, 50, tmp_path, every=3))


@pytest.mark.parametrize("name", observing())
def test_a_request_that_is_read_again_goes_on_as_it_would_have(name: str, tmp_path: Path) -> None:
    check(*asked(name, 0.4, tmp_path, every=3), lost_after=(3, 8))


@pytest.mark.parametrize("name", ["raas", "rpc", "random-attention", "r-kv"])
def test_methods_of_long_replies_without_the_prompt(name: str, tmp_path: Path) -> None:
    """The last chunk of a prompt is one token, and no token of a reply."""
    check(*asked(name, 60, tmp_path, every=3, prompt=False), chunks=(64, 45, 1))


@needs_triton
@pytest.mark.parametrize(
    ("name", "options"),
    [("keepkv", {"allocate": "adakv", "threshold": -1}), pytest.param("keepkv", {}, marks=pytest.mark.slow),
     pytest.param("keepkv2", {}, marks=pytest.mark.slow)],
    ids=["ragged-votes", "equal", "roaming"],
)  # fmt: skip
def test_the_kernel_for_blocks_says_the_same(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keepkv.kernels.paged import triton

    calls, kernel = [], triton.paged_attention
    extra, default = asked(name, 50, tmp_path, every=3, **options)
    wish = wish_of(extra, default)
    assert wish is not None
    said, paged = expected(wish, 5)[0], Paged(model())
    monkeypatch.setattr(triton, "paged_attention", lambda *given: calls.append(1) or kernel(*given))
    monkeypatch.setenv("KEEPKV_KERNELS", "triton")
    assert paged.reply(prompt(), extra, 5, (PROMPT,)) == said
    assert len(calls) == 3 * 4, "each token of the reply but the first, in each layer"


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_is_not_served_is_refused_with_what_to_do(name: str) -> None:
    with pytest.raises(KeepKVError, match=REFUSED[name]) as refused:
        wish_of({"keepkv_method": name, "keepkv_budget": 0.4}, None)
    said = str(refused.value)
    called = PRESETS[name].method if name in PRESETS else name
    assert any(word in said for word in REMEDIES) and f"method {called!r}" in said


def test_replies_differ_from_those_of_everything_kept() -> None:
    """Else the tests above would show little."""
    wish = wish_of({"keepkv_method": "snapkv", "keepkv_budget": 60, "keepkv_every": 5}, None)
    whole = wish_of({"keepkv_method": "snapkv", "keepkv_budget": 1000, "keepkv_every": 5}, None)
    assert wish is not None and whole is not None and expected(wish, REPLY)[0] != expected(whole, REPLY)[0]
