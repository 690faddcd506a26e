"""How near each kernel comes to the time that its memory traffic needs, beside its reference and torch's own attention.

    python -m benchmarks.kernels.kernel_times [--only decode_attention] [--out DIRECTORY]  # on a CUDA device
    python -m benchmarks.kernels.kernel_times --interpret  # tiny, on the CPU: does it run?

The floor of a row is the bytes that must move (inputs once, outputs once) by the bandwidth of a device copy, measured
in the same run. Times are of the device alone, with a cold L2 cache: median, 20th and 80th percentile. Writes
``kernels.csv``, ``kernels.json`` and ``kernels.md``. What ran in the interpreter says nothing about speed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

if "--interpret" in sys.argv:  # Triton must know before anything imports it
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keepkv import kernels
from keepkv.measure.environment import revision, versions

ROOT = Path(__file__).parents[2]
FLUSH = 1 << 29  # bytes written between runs: more than any L2 cache holds


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
    "window_scores": (Shape("prompt", 4, 32768), Shape("long prompt", 1, 131072)),
    "nearest_key": (Shape("prompt", 4, 32768),),
    "merge_groups": (Shape("prompt", 4, 32768),),
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


@dataclass
class Row:
    kernel: str
    variant: str
    way: str
    shape: dict[str, Any]
    bytes: int
    flops: int
    floor_ms: float
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    times_floor: float | None = None  # median / floor: 1 is as fast as a copy of the same bytes
    tflops: float | None = None
    runs: int = 0
    error: float | None = None  # largest difference from the reference's output
    note: str = ""


class Timer:
    """Milliseconds of a function, on a CUDA device by its own events, else by the clock."""

    def __init__(self, device: torch.device, repeat: int, seconds: float) -> None:
        self.device, self.repeat, self.seconds = device, repeat, seconds
        self.flush = torch.empty(FLUSH if device.type == "cuda" else 1, dtype=torch.int8, device=device)

    def __call__(self, function: Callable[[], Any]) -> Tensor:
        for _ in range(2):  # compiles and allocates
            function()
        times: list[float] = []
        until = time.monotonic() + self.seconds
        while len(times) < 3 or (len(times) < self.repeat and time.monotonic() < until):
            times.append(self._once(function))
        return torch.tensor(times, dtype=torch.float64)

    def _once(self, function: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            function()
            return 1000 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()  # keeps the device busy while the host launches, too
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def bandwidth(timer: Timer) -> float:
    """Bytes a second of a copy on the device, read and written bytes both counted."""
    size = 1 << (30 if timer.device.type == "cuda" else 20)
    source = torch.empty(size, dtype=torch.int8, device=timer.device)
    target = torch.empty_like(source)
    return 2 * size / (timer(lambda: target.copy_(source)).median().item() / 1000)


def cases(kernel: str, shape: Shape, device: torch.device) -> Iterator[Case]:
    torch.manual_seed(0)
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
        # As many slots, unevenly: from a quarter to seven quarters of the mean.
        share = torch.linspace(0.25, 1.75, b * h)[torch.randperm(b * h)]
        lengths = (share * s).long().clamp(max=2 * s).to(device).view(b, h)
        total, longest = int(lengths.sum()), int(lengths.max())
        offsets = (lengths.flatten().cumsum(0) - lengths.flatten()).view(b, h)
        flat = keys.view(n, d)[:total], values.view(n, d)[:total], votes.view(n)[:total]
        where = {"offsets": offsets, "lengths": lengths, "longest": longest, "scaling": scaling}
        scale = total / n
        yield Case("decode_attention", "ragged, votes", shape, int(moved * scale), int(flops * scale), {
            way: lambda way=way: kernels.decode_attention(query, *flat, **where, backend=way)
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


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def measure(case: Case, timer: Timer, speed: float) -> Iterator[Row]:
    """A row for each way; one that does not fit into memory says so."""
    shape = {name: str(x) if isinstance(x, torch.dtype) else x for name, x in asdict(case.shape).items()}
    expected: Tensor | None = None
    for way, run in case.ways.items():
        row = Row(case.kernel, case.variant, way, shape, case.bytes, case.flops, 1000 * case.bytes / speed)
        try:
            if case.compare:
                got = first(run()).float().flatten()
                if way == "reference":
                    expected = got
                elif expected is not None:
                    row.error = (got - expected)[expected.isfinite()].abs().max().item()  # −inf: no answer, in both
                del got
            times = timer(run)
        except torch.OutOfMemoryError:
            row.note = "out of memory"
            yield row
            continue
        low, median, high = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        row.p20_ms, row.median_ms, row.p80_ms, row.runs = low, median, high, len(times)
        row.times_floor, row.tflops = median / row.floor_ms, case.flops / median / 1e9
        yield row


def setting(device: torch.device, speed: float, interpreted: bool) -> dict[str, Any]:
    """What the rows were measured with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "device": f"{name}, interpreter: times mean nothing" if interpreted else name,
        "copy_gb_per_s": speed / 1e9,
        **versions(),
        "triton": metadata.version("triton"),
        "cuda": torch.version.cuda,
        "revision": revision(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write(rows: list[Row], head: dict[str, Any], out: Path) -> str:
    """All three files; returns the table."""
    out.mkdir(parents=True, exist_ok=True)
    flat = [{**asdict(row), **{f"shape_{k}": v for k, v in row.shape.items()}, **head} for row in rows]
    for row in flat:
        del row["shape"]
    with (out / "kernels.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, flat[0])
        table.writeheader()
        table.writerows(flat)
    (out / "kernels.json").write_text(json.dumps({**head, "rows": flat}, indent=1) + "\n")
    text = markdown(rows, head)
    (out / "kernels.md").write_text(text)
    return text


def markdown(rows: list[Row], head: dict[str, Any]) -> str:
    lines = [
        ", ".join(f"{name} {x}" for name, x in head.items() if name != "copy_gb_per_s")
        + f". Copy: {head['copy_gb_per_s']:.0f} GB/s.",
        "",
        "| kernel | shape | what | by | median ms | 20–80 % | floor ms | × floor | TFLOP/s | error |",
        "|" + "---|" * 10,
    ]
    for r in rows:
        s = r.shape
        where = f"{s['name']}: B {s['rows']}, H {s['heads']}, G {s['groups']}, S {s['slots']}, D {s['dim']}"
        start = f"| {r.kernel} | {where}, {s['dtype'].removeprefix('torch.')} | {r.variant} | {r.way} |"
        if r.median_ms is None:
            lines.append(f"{start} {r.note} | | {r.floor_ms:.3f} | | | |")
            continue
        error = "" if r.error is None else f"{r.error:.1e}"
        lines.append(
            f"{start} {r.median_ms:.3f} | {r.p20_ms:.3f}–{r.p80_ms:.3f} | {r.floor_ms:.3f} | {r.times_floor:.2f} | "
            f"{r.tflops:.1f} | {error} |"
        )
    return "\n".join(lines) + "\n"


@torch.inference_mode()
def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*SHAPES], help="one kernel")
    parser.add_argument("--repeat", type=int, default=50, help="most runs of each way")
    parser.add_argument("--seconds", type=float, default=5.0, help="most time for each way, once three runs are done")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes in Triton's interpreter, on the CPU")
    parser.add_argument("--out", type=Path, help="default: benchmarks/kernels/results; build/kernels if tiny")
    args = parser.parse_args(words)
    if not args.interpret and not torch.cuda.is_available():
        print("No CUDA device here, so nothing was measured. --interpret shows on the CPU that the benchmark runs.")
        return 1
    device, tiny = torch.device("cpu" if args.interpret else "cuda"), args.tiny or args.interpret
    timer = Timer(device, args.repeat, 0 if tiny else args.seconds)
    speed = bandwidth(timer)
    rows: list[Row] = []
    for kernel, shapes in SHAPES.items():
        for shape in (TINY,) if tiny else shapes:
            for case in cases(kernel, shape, device) if args.only in (None, kernel) else ():
                rows += measure(case, timer, speed)
                print(f"{kernel}, {shape.name}, {case.variant}: done", flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    out = args.out or ROOT / ("build/kernels" if tiny else "benchmarks/kernels/results")
    print(write(rows, setting(device, speed, args.interpret), out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
