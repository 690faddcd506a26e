"""One token's attention over codes or exact slots on a CPU, by ``decode.cpp``: tensors to pointers and strides."""

from __future__ import annotations

from ctypes import CDLL, Structure, byref, c_double, c_int64, c_void_p

import torch
from torch import Tensor

from keepkv.kernels.codes import Codes
from keepkv.kernels.decode.reference import Decoded
from keepkv.kernels.logits import KeySlots, with_sinks
from keepkv.kernels.native import library
from keepkv.kernels.segments import Segments

SIGNED = 9  # ``bits`` of codes of 8 bits with a sign
EXACT = {torch.float16: 16, torch.bfloat16: 17, torch.float32: 32}  # ``bits`` of vectors that are no codes
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # ``type`` of scales and zeros
GROUPS = 8  # of a vector with a scale of their own, at most


class Field(Structure):
    """As ``Field`` of decode.cpp."""

    _fields_ = [("data", c_void_p), ("row", c_int64), ("head", c_int64), ("each", c_int64), ("type", c_int64)]


NOTHING = Field()


class Vectors(Structure):
    """As ``Vectors`` of decode.cpp."""

    _fields_ = [
        ("rows", Field), ("scale", Field), ("zero", Field), ("levels", c_void_p), ("width", c_int64), ("bits", c_int64),
    ]  # fmt: skip


class Call(Structure):
    """As ``Call`` of decode.cpp."""

    _fields_ = [
        ("keys", Vectors), ("values", Vectors), ("votes", Field), ("positions", Field),
        *((name, c_void_p) for name in ("first", "lengths", "query", "output", "lse", "logits")),
        *((f"logits_{name}", c_int64) for name in ("row", "head", "query")),
        *((name, c_int64) for name in ("rows", "heads", "groups", "longest", "threads")),
        ("softcap", c_double),
    ]  # fmt: skip


def obstacle(query: Tensor, *vectors: Codes | Tensor) -> str | None:
    """Why ``decode_attention`` does not take a query and ``vectors``, keys and values; None where it does."""
    rows = [x.codes if isinstance(x, Codes) else x for x in vectors]
    if any(x.device.type != "cpu" for x in (query, *rows)):
        return "the tensors are not on the CPU"
    if query.dtype not in EXACT:
        return f"they take queries in {', '.join(map(str, EXACT))}, not {query.dtype}"
    if torch.compiler.is_compiling():
        return "they cannot be part of a compiled graph"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, *rows)):
        return "they have no backward: wrap the call in torch.no_grad()"
    found = next((said for x in vectors if (said := _obstacle_in(x))), None)
    if found is None and isinstance(built := library(), str):
        return built
    return found


def _obstacle_in(x: Codes | Tensor) -> str | None:
    if isinstance(x, Tensor):
        return None if x.dtype in EXACT else f"they take slots in {', '.join(map(str, EXACT))} or codes, not {x.dtype}"
    groups, word = x.scale.shape[-1], 32 // x.bits
    if groups > GROUPS or (groups > 1 and x.width // groups % word):
        return f"{groups} groups of {x.width} codes of {x.bits} bits: at most {GROUPS}, of a multiple of {word} each"
    dtypes = {y.dtype for y in (x.scale, x.zero) if y is not None}
    return None if dtypes <= TYPES.keys() else f"scales and zeros are {', '.join(map(str, dtypes))}"


def decode_attention(
    query: Tensor, slots: KeySlots, keys: Codes | Tensor, values: Codes | Tensor, weights: bool
) -> Decoded:
    """``kernels.decode_attention`` with its arguments checked, and nothing in the way; everything is float32.

    ``keys`` and ``values`` are floating or codes without turns, and stand for ``slots.keys``. The sums are the same
    whatever the number of threads.
    """
    segments = slots.segments
    (b, heads, _), h = query.shape, segments.heads
    query = (query.float() * slots.scaling).contiguous()
    width = values.width if isinstance(values, Codes) else values.shape[-1]
    output, lse = query.new_empty(b, heads, width), query.new_empty(b, heads)
    logits = segments.empty_per_query(slots.keys, heads // h, torch.float32).fill_(-torch.inf) if weights else None
    held: list[Tensor] = []  # what the call reads, until it is over
    votes = None if slots.log_votes is None else slots.log_votes.float()
    call = Call(
        _vectors(keys, segments, held), _vectors(values, segments, held), _field(votes, segments, held),
        _positions(slots.positions, segments, held), _pointer(segments.first), _pointer(segments.lengths),
        query.data_ptr(), output.data_ptr(), lse.data_ptr(), _pointer(logits), *segments.strides(logits),
        b, h, heads // h, segments.longest, torch.get_num_threads(), slots.softcap or 0.0,
    )  # fmt: skip
    built = library()
    assert isinstance(built, CDLL)
    built.keepkv_decode(byref(call))
    if slots.sinks is not None:
        seen, lse = lse, with_sinks(lse.view(b, h, -1), slots.sinks).view_as(lse)
        output *= (seen - lse.masked_fill(lse.isneginf(), 0.0)).exp()[..., None]
    return Decoded(output, lse, None if logits is None else _weights(logits, lse, segments))


def _weights(logits: Tensor, lse: Tensor, segments: Segments) -> Tensor:
    """Attention weights of logits, in place; −inf are those of no slot."""
    lse = lse.masked_fill(lse.isneginf(), 0.0).view(segments.rows, segments.heads, -1)
    if not segments.ragged:
        return logits.sub_(lse[..., None]).exp_()
    index, inside = segments.index()
    assert index is not None and inside is not None
    own = index[inside]
    logits[:, own] -= lse.movedim(2, 0)[..., None].expand(-1, *inside.shape)[:, inside]
    return logits.exp_()


def _vectors(x: Codes | Tensor, segments: Segments, held: list[Tensor]) -> Vectors:
    if isinstance(x, Tensor):
        rows, size = _field(x, segments, held), x.element_size()
        rows.row, rows.head = rows.row * size, rows.head * size
        return Vectors(rows, NOTHING, NOTHING, None, x.shape[-1], EXACT[x.dtype])
    levels = None if x.levels is None else x.levels.float().contiguous()
    if levels is not None:
        held.append(levels)
    fields = (_field(one, segments, held) for one in (x.codes, x.scale, x.zero))
    return Vectors(*fields, _pointer(levels), x.width, SIGNED if x.signed else x.bits)


def _positions(x: Tensor | None, segments: Segments, held: list[Tensor]) -> Field:
    if x is None:
        return NOTHING
    wide = x.dtype == torch.int64
    field = _field(x if wide else x.to(torch.int32), segments, held)
    field.type = int(wide)
    return field


def _field(x: Tensor | None, segments: Segments, held: list[Tensor]) -> Field:
    """``x`` with its strides; of a copy, where its slots or the elements of a slot do not lie side by side."""
    if x is None:
        return NOTHING
    slot, strides = 0 if segments.ragged else 2, x.stride()
    each = x.shape[-1] if len(strides) > slot + 1 else 1
    if strides[slot] != each or (each > 1 and strides[-1] != 1):
        x = x.contiguous()
        strides = x.stride()
    held.append(x)
    row, head = (0, 0) if segments.ragged else strides[:2]
    return Field(x.data_ptr(), row, head, each, TYPES.get(x.dtype, 0))


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
