"""Named tensors and a header in one file: the format of safetensors, with a checksum; never pickle."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from keepkv.core import wholefile
from keepkv.errors import KeepKVError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 1 << 24  # bytes of everything before the tensors
MAX_FILE = 1 << 38  # bytes that are read where nobody says otherwise: 256 GiB


@dataclass(frozen=True)
class Declared:
    """What a file says of a tensor before it is read: dtype, shape, and the byte of the data where it starts."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


Inspect = Callable[[str, Any, Mapping[str, Declared]], None]


@dataclass(frozen=True)
class Source:
    """How a file is read. formats: those that are taken, and ``what`` they are. wrong: the error that is raised.

    key: the signature must have been made with it. max_bytes: of the whole file. inspect: called with format, header
    and declared tensors before any tensor is read; raises where they will not do.
    """

    formats: Sequence[str]
    what: str
    wrong: type[KeepKVError]
    key: bytes | None = None
    max_bytes: int = MAX_FILE
    inspect: Inspect = lambda format, header, declared: None


def write(path: Path, format: str, header: str, tensors: Mapping[str, Tensor], key: bytes | None = None) -> None:
    """Write ``tensors`` and ``header`` (JSON) to ``path``, which holds either what it held or all of the new file.

    format: what the file is, e.g. "keepkv-calibration-1"; ``read`` asks for the same. key: a signature of the content
    that only who has the key can make. Raises ``OSError``.
    """
    held = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    order = sorted(held, key=lambda name: (-held[name].element_size(), name))  # every tensor starts where it may
    told: dict[str, Any] = {"__metadata__": {"format": format, "header": header, "digest": digest(header, held)}}
    if key is not None:
        told["__metadata__"]["signature"] = signature(key, format, told["__metadata__"]["digest"])
    end = 0
    for name in order:
        x, start = held[name], end
        end += x.numel() * x.element_size()
        told[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise OSError(f"its header has {len(text)} bytes, and files have at most {MAX_HEADER}")

    def put(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes(held[name]))

    wholefile.replace(path, put)


def read(path: Path, source: Source) -> tuple[str, Any, dict[str, Tensor]]:
    """Format, header and tensors of a file that ``write`` made, on the CPU.

    Raises ``source.wrong`` where the file is missing, too large, truncated, altered, not what it should be, or has not
    the signature of ``source.key``. It is opened once; nothing is allocated that the file does not hold.
    """
    try:
        with wholefile.open_regular(path) as file:
            return _read(file, source)
    except FileNotFoundError as error:
        raise source.wrong(f"{path}: no such file") from error
    except OSError as error:
        raise source.wrong(f"cannot read {str(path)!r}: {wholefile.reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise source.wrong(f"{path}: {str(error) or type(error).__name__}") from error
    except (MemoryError, RuntimeError) as error:
        raise source.wrong(f"{path}: does not fit into memory: {error}") from error


def _read(file: BinaryIO, source: Source) -> tuple[str, Any, dict[str, Tensor]]:
    size = file.seek(0, 2)
    if size > source.max_bytes:
        raise ValueError(f"has {size} bytes, more than max_bytes={source.max_bytes}")
    file.seek(0)
    try:
        length = int.from_bytes(_exactly(file, 8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        told = parse(_exactly(file, length).decode("utf-8"))
        meta, declared = _declared(told, size - 8 - length)
    except (ValueError, RecursionError) as error:
        said = str(error) or type(error).__name__
        raise ValueError(f"not a readable safetensors file, or truncated: {said}") from error
    format = meta.get("format", "")
    if format not in source.formats:
        raise ValueError(f"not {source.what} written by keepkv ({format!r:.40}, need {source.formats[0]!r})")
    if meta.keys() - {"signature"} != {"format", "header", "digest"}:
        raise ValueError(f"metadata {sorted(meta)}, where format, header and digest should be")
    if source.key is not None:
        _check_signature(source.key, format, meta)
    try:
        header = parse(meta["header"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not JSON that can be read: {str(error) or type(error).__name__}") from error
    source.inspect(format, header, declared)
    tensors = {name: _tensor(file, 8 + length, one) for name, one in declared.items()}
    if digest(meta["header"], tensors) != meta["digest"]:
        raise ValueError("contents do not match their checksum; the file was altered or damaged")
    return format, header, tensors


def parse(text: str) -> Any:
    """The value of a JSON text. Raises ``ValueError`` where it is none: for NaN and for names said twice, too."""
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)


def digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 in hexadecimal of a header and of the name, dtype, shape and bytes of each tensor."""
    sha = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}{x.dtype}{tuple(x.shape)}".encode())
        sha.update(_bytes(x))
    return sha.hexdigest()


def all_finite(x: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity, looked at a few MiB at a time."""
    if not x.is_floating_point():
        return True
    parts = x.reshape(-1).split(1 << 20)
    return all(bool((part.float() if part.itemsize == 1 else part).isfinite().all()) for part in parts)


def signature(key: bytes, format: str, digest: str) -> str:
    """HMAC-SHA-256 in hexadecimal of a file's content, told by its digest."""
    return hmac.new(key, f"{format}\n{digest}".encode(), hashlib.sha256).hexdigest()


def _check_signature(key: bytes, format: str, meta: Mapping[str, str]) -> None:
    if "signature" not in meta:
        raise ValueError("has no signature, and a key was given: it was saved without one, or by somebody else")
    if not hmac.compare_digest(meta["signature"].encode(), signature(key, format, meta["digest"]).encode()):
        raise ValueError("has a signature that was not made with this key")


def _declared(told: Any, size: int) -> tuple[dict[str, str], dict[str, Declared]]:
    """Metadata and tensors of a file with ``size`` bytes of data: in a row, without gaps or overlaps."""
    if not isinstance(told, dict):
        raise ValueError("its header is no object")
    meta, declared, end = told.pop("__metadata__", {}), [], 0
    if not isinstance(meta, dict) or not all(isinstance(x, str) for x in meta.values()):
        raise ValueError("its metadata are not texts")
    for name, one in told.items():
        if not isinstance(one, dict) or one.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {name!r:.40} without dtype, shape and place")
        dtype, shape, place = one["dtype"], one["shape"], one["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"tensor {name!r:.40} of dtype {dtype!r:.20}")
        if not (_are_sizes(shape) and _are_sizes(place)):
            raise ValueError(f"tensor {name!r:.40} of shape {shape!r:.60} at {place!r:.60}")
        if len(shape) > 8 or len(place) != 2:
            raise ValueError(f"tensor {name!r:.40} of {len(shape)} dimensions, {len(place)} ends")
        declared.append((place, name, Declared(DTYPES[dtype], tuple(shape), place[0])))
    for (start, stop), name, tensor in sorted(declared, key=lambda x: x[0]):
        if start != end or stop - start != tensor.size:
            raise ValueError(f"tensor {name!r:.40} of {tensor.size} bytes lies at {start} to {stop}, after {end}")
        end = stop
    if end != size:
        raise ValueError(f"{size} bytes of data, where its tensors take {end}")
    return meta, {name: tensor for _, name, tensor in declared}


def _are_sizes(given: Any) -> bool:
    return isinstance(given, list) and all(type(x) is int and 0 <= x < 1 << 48 for x in given)


def _tensor(file: BinaryIO, offset: int, declared: Declared) -> Tensor:
    x = torch.empty(declared.shape, dtype=declared.dtype)
    file.seek(offset + declared.start)
    if x.numel() and file.readinto(_bytes(x)) != declared.size:  # type: ignore[attr-defined]
        raise ValueError("it became shorter while it was read")
    return x


def _bytes(x: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, sharing memory."""
    held: Any = x.reshape(-1).view(torch.uint8).numpy() if x.numel() else b""
    return memoryview(held)


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ValueError(f"{len(data)} bytes where {count} were to be")
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name is said twice")
    return made


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")
