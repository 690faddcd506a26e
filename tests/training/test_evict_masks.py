"""One layer's mask: against a loop, and FlexAttention against the dense mask as far as a CPU goes."""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers.masking_utils import causal_mask_function

from keepkv.training import NEVER
from keepkv.training.masks import block_mask, by_column, positions_of, visible

B, H, G, T = 2, 2, 3, 9


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers by column (B,H,T), positions (B,T), and the causal mask with padding (B,1,T,T)."""
    padding = torch.ones(B, T, dtype=torch.bool)
    padding[1, :3] = padding[0, -2:] = False
    generator = torch.Generator().manual_seed(0)
    leaves = torch.arange(7) + torch.randint(1, 5, (B, H, 7), generator=generator)
    leaves = leaves.masked_fill(torch.rand(B, H, 7, generator=generator) < 0.3, NEVER).int()
    positions = positions_of(padding, B, T, torch.device("cpu"))
    block = torch.ones(T, T, dtype=torch.bool).tril() & padding[:, None, None]
    return by_column(leaves, positions), positions, block


def test_visible_is_the_definition() -> None:
    evict_at, positions, block = case()
    found = visible(evict_at, positions, block)
    for b in range(B):
        for h in range(H):
            for i in range(T):
                for j in range(T):
                    real = j <= i and positions[b, j] >= 0 and positions[b, i] < evict_at[b, h, j]
                    assert bool(found[b, h, i, j]) == (bool(real) or i == j)
    assert not torch.equal(found, visible(torch.full_like(evict_at, NEVER), positions, block))


def test_flex_attention_is_the_dense_mask() -> None:
    evict_at, positions, block = case()
    shown = visible(evict_at, positions, block).repeat_interleave(G, 1)
    made = block_mask(evict_at, positions, causal_mask_function, H * G)
    assert torch.equal(create_mask(made.mask_mod, B, H * G, T, T, device="cpu"), shown)
    query, key, value = (torch.randn(B, n, T, 16) for n in (H * G, H, H))
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(G, 1), value.repeat_interleave(G, 1), shown
    )
    assert torch.allclose(flex_attention(query, key, value, block_mask=made, enable_gqa=True), dense, atol=1e-5)
