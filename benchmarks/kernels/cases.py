"""What is measured of each kernel: shapes, variants, the bytes that must move, and who does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keepkv import kernels
from keepkv.kernels.codes import Codes


@dataclass(frozen=True)
class Shape:
    """rows B, heads H, groups G, slots S, dim D; share of the slots that are kept; window: queries that score."""

    name: str
    rows: int
    slots: int
    heads: int = 8
    groups: int = 4
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    share: float = 0.1
    window: int = 32


ACCEPTANCE = Shape("acceptance", 16, 32768)
SHAPES = {
    "decode_attention": (ACCEPTANCE, Shape("one row", 1, 32768), Shape("long", 1, 131072), Shape("short", 8, 4096)),
    "decode_packed": (ACCEPTANCE, Shape("one row", 1, 32768), Shape("long", 1, 131072)),
    "window_scores": (Shape("prompt", 4, 32768), Shape("long prompt", 1, 131072)),
    "nearest_key": (Shape("prompt", 4, 32768),),
    "merge_groups": (Shape("prompt", 4, 32768),),
}
# Variants of ``decode_packed``: bits, numbers of a group (0: one scale and zero a slot), a table of levels and no zero.
PACKED = {
    "4 bits": (4, 0, False),
    "4 bits, groups of 32": (4, 32, False),
    "4 bits, levels": (4, 0, True),
    "2 bits": (2, 0, False),
    "8 bits": (8, 0, False),
}
TINY = Shape("tiny", 2, 64, heads=2, groups=2, dim=32, window=4)


@dataclass
class Case:
    """One kernel on one shape: what must move, what must be multiplied, and who does it."""

    kernel: str
    variant: str
    shape: Shape
    bytes: int
    flops: int
    ways: dict[str, Callable[[], Any]]
    compare: bool = True  # whether the first output of each way is compared with that of "reference"


def cases(kernel: str, shape: Shape, device: torch.device) -> Iterator[Case]:
    torch.manual_seed(0)
    if kernel == "decode_packed":
        yield from packed_cases(shape, device)
        return
    b, h, g, s, d = shape.rows, shape.heads, shape.groups, shape.slots, shape.dim
    width, n = shape.dtype.itemsize, b * h * s

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=shape.dtype)

    keys, values = normal(b, h, s, d), normal(b, h, s, d)
    votes = torch.randint(1, 9, (b, h, s), device=device).float().log()
    positions = torch.arange(s, device=device, dtype=torch.int32).repeat(b, h, 1)
    scaling = d**-0.5
    kept = torch.rand(b, h, s, device=device) < shape.share

    if kernel == "decode_attention":
        query = normal(b, h * g, d)
        moved = 2 * n * d * width + 4 * n + 2 * b * h * g * d * width
        flops = 4 * n * g * d

        def ours(backend: str, **options: Any) -> Callable[[], Any]:
            return lambda: kernels.decode_attention(query, keys, values, votes, **common, backend=backend, **options)

        common: dict[str, Any] = {"scaling": scaling}
        grouped, mask = query.view(b, h, g, d), votes[:, :, None].to(shape.dtype)
        plain = {"scale": scaling}
        yield Case("decode_attention", "rectangle, votes", shape, moved, flops, {
            "reference": ours("reference"),
            "triton": ours("triton"),
            "sdpa, votes as a mask": lambda: scaled_dot_product_attention(grouped, keys, values, mask, **plain),
        })  # fmt: skip
        yield Case("decode_attention", "rectangle, votes, weights out", shape, moved + 4 * n * g, flops, {
            "reference": ours("reference", weights=True), "triton": ours("triton", weights=True),
        })  # fmt: skip

        def unvoted(backend: str) -> Callable[[], Any]:
            return lambda: kernels.decode_attention(query, keys, values, scaling=scaling, backend=backend)

        spread_out = query[:, :, None]
        yield Case("decode_attention", "rectangle, no votes", shape, moved - 4 * n, flops, {
            "reference": unvoted("reference"), "triton": unvoted("triton"),
            "sdpa": lambda: scaled_dot_product_attention(grouped, keys, values, **plain),
            "sdpa, enable_gqa": lambda: scaled_dot_product_attention(
                spread_out, keys, values, **plain, enable_gqa=True
            ),
        })  # fmt: skip
        where, total = uneven(shape, device)
        flat = keys.view(n, d)[:total], values.view(n, d)[:total], votes.view(n)[:total]
        scale = total / n
        yield Case("decode_attention", "ragged, votes", shape, int(moved * scale), int(flops * scale), {
            way: lambda way=way: kernels.decode_attention(query, *flat, **where, scaling=scaling, backend=way)
            for way in ("reference", "triton")
        })  # fmt: skip
    elif kernel == "window_scores":
        w = shape.window
        queries = normal(b, h * g, w, d)
        asked = torch.arange(s - w, s, device=device).repeat(b, 1)
        yield Case(kernel, f"{w} queries", shape, 2 * n * (d * width + 8) + 4 * n * g, 4 * n * g * w * d, {
            way: lambda way=way: kernels.window_scores(
                queries, asked, keys, positions, votes, scaling=scaling, backend=way
            )
            for way in ("reference", "triton")
        })  # fmt: skip
    elif kernel == "nearest_key":
        targets = int(kept.sum())
        pairs = int((kept.sum(-1) * (~kept).sum(-1)).sum())
        moved = n * d * width + n * (8 + 4) + 8 * n
        yield Case(kernel, f"{targets} targets of {n}", shape, moved, 2 * pairs * d, {
            way: lambda way=way: kernels.nearest_key(keys, ~kept, kept, backend=way)[::-1]
            for way in ("reference", "triton")
        })  # fmt: skip
    else:
        size = max(1, int(shape.share * s))
        group = torch.randint(0, size, (b, h, s), device=device)
        moved = 2 * n * d * width + n * (4 + 8) + b * h * size * (2 * d + 1) * 4
        yield Case(kernel, f"into {size} groups", shape, moved, 4 * n * d, {
            way: lambda way=way: kernels.merge_groups(votes, keys, values, group, size, backend=way)
            for way in ("reference", "triton")
        })  # fmt: skip


def uneven(shape: Shape, device: torch.device) -> tuple[dict[str, Any], int]:
    """Where the slots of ragged heads lie, from a quarter to seven quarters of ``shape.slots`` each; and how many."""
    b, h, s = shape.rows, shape.heads, shape.slots
    share = torch.linspace(0.25, 1.75, b * h)[torch.randperm(b * h)]
    lengths = (share * s).long().clamp(max=2 * s).to(device).view(b, h)
    offsets = (lengths.flatten().cumsum(0) - lengths.flatten()).view(b, h)
    return {"offsets": offsets, "lengths": lengths, "longest": int(lengths.max())}, int(lengths.sum())


def packed_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """``decode_packed`` over ragged slots with votes, beside ``decode_attention`` over the same slots in 16 bits."""
    b, h, g, d = shape.rows, shape.heads, shape.groups, shape.dim
    query = torch.randn(b, h * g, d, device=device, dtype=shape.dtype)
    where, n = uneven(shape, device)
    votes = torch.randint(1, 9, (n,), device=device).float().log()
    common = {"log_votes": votes, **where, "scaling": d**-0.5}

    def codes(bits: int, group: int, table: bool) -> Codes:
        code = torch.randint(0, 256, (n, d * bits // 8), device=device, dtype=torch.uint8)
        scale = (torch.rand(n, d // (group or d), device=device) + 0.5) / (1 if table else 2**bits / 3.5)
        levels = torch.linspace(-2, 2, 2**bits, device=device) if table else None
        zero = None if table else (-(2 ** (bits - 1)) * scale).half()
        return Codes(code, scale.half(), zero, bits, d, levels)

    def ours(backend: str, keys: Codes, values: Codes) -> Callable[[], Any]:
        return lambda: kernels.decode_packed(query, keys, values, **common, backend=backend)

    for name, options in PACKED.items():
        keys, values = codes(*options), codes(*options)
        held = [x for one in (keys, values) for x in (one.codes, one.scale, one.zero) if x is not None]
        moved = sum(x.numel() * x.element_size() for x in (*held, votes, query, query))
        ways = {way: ours(way, keys, values) for way in ("reference", "triton")}
        if name == "4 bits":
            plain = keys.expand(shape.dtype), values.expand(shape.dtype)
            ways["decode_attention, 16 bits"] = partial(
                kernels.decode_attention, query, *plain, **common, backend="triton"
            )
        yield Case("decode_packed", f"ragged, votes, {name}", shape, moved, 4 * n * g * d, ways)
