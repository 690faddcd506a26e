"""One token's attention over encoded slots: what it reads, and the memory that it takes beside them."""

from __future__ import annotations

import pytest
import torch
from allocations import peak
from torch import Tensor
from torch.testing import assert_close

from keepkv.attention.attend import attend
from keepkv.core.layer_info import LayerInfo
from keepkv.core.rope import Rope
from keepkv.kernels import native
from keepkv.kernels.codes import Codes
from keepkv.store import CODECS, STORES, Held
from keepkv.store.zones import Zones

B, H, G, D = 1, 2, 2, 64
ROPE = Rope(1.0 / 10_000 ** (torch.arange(0, D, 2) / D))
PACKED = ["int8", "fp8", "int4", "int2", "hadamard", "lloyd-max"]  # read where they lie
IN_TILES = ["kivi", "kvquant"]
per_layout = pytest.mark.parametrize("layout", ["dense", "ragged"])


def filled(layout: str, codec: str, tokens: int, dtype: torch.dtype = torch.float32) -> Zones:
    """A store that has read ``tokens`` tokens; half of one head's were dropped where it can be ragged."""
    made = STORES.build(layout, Held(codec=CODECS.build(codec), layer=LayerInfo(rope=ROPE), votes=False))
    assert isinstance(made, Zones)
    keys, values = torch.randn(2, B, H, tokens, D, dtype=dtype)
    made.append(keys, values, torch.arange(tokens)[None])
    if layout == "dense":
        made.after_prefill()
        return made
    view, after = made.view(), made.successor()
    keep = view.valid.clone()
    keep[:, 0, : tokens // 2] = False
    after.load_kept(view, keep)
    assert isinstance(after, Zones)
    return after


def step(store: Zones, query: Tensor) -> Tensor:
    return attend(query, store.parts(), 0.125).output


@per_layout
@pytest.mark.parametrize("codec", PACKED + IN_TILES)
def test_attention_is_over_what_the_store_reads(layout: str, codec: str) -> None:
    store, query = filled(layout, codec, 300), torch.randn(B, H * G, 1, D)
    assert any(isinstance(part.keys, Codes) for part in store.parts()) == (codec in PACKED)
    slots = store.view()
    u = query.view(B, H, G, D) @ slots.keys.mT * 0.125
    share = u.masked_fill(~slots.valid[:, :, None], -torch.inf).softmax(-1)
    assert_close(step(store, query).view(B, H, G, D), share @ slots.values, rtol=1e-4, atol=1e-4)


@per_layout
@pytest.mark.parametrize("codec", PACKED)
@pytest.mark.skipif(isinstance(native.library(), str), reason="no kernels in C++")
def test_codes_are_never_expanded(layout: str, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the slots take no byte more: all of them expanded are 4 MiB."""
    monkeypatch.delenv("KEEPKV_KERNELS", raising=False)
    query, taken = torch.randn(B, H * G, 1, D), []
    for tokens in (1000, 4000):
        store = filled(layout, codec, tokens)
        step(store, query)
        taken.append(peak(lambda store=store: step(store, query)))  # type: ignore[misc]
    assert 0 < taken[0] == taken[1] < 1 << 17


@per_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codec", PACKED + IN_TILES)
def test_no_more_than_a_tile_is_expanded(
    layout: str, codec: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In plain torch, all that comes in between included."""
    tile = 1 << 20
    monkeypatch.setenv("KEEPKV_KERNELS", "reference")
    monkeypatch.setattr("keepkv.store.zones.TILE_BYTES", tile)
    monkeypatch.setattr("keepkv.kernels.packed.reference.TILE_BYTES", tile)
    query, taken = torch.randn(B, H * G, 1, D, dtype=dtype), []
    for tokens in (3000, 12000):
        store = filled(layout, codec, tokens, dtype)
        taken.append(peak(lambda store=store: step(store, query)))  # type: ignore[misc]
    assert 1 << 18 < taken[0] <= tile
    assert taken[1] - taken[0] < tile / 3  # outputs of tiles, joined at the end; all of it expanded: 4 MiB more, or 9
