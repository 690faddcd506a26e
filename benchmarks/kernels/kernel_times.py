"""How near each kernel comes to the time that its memory traffic needs, beside its reference and torch's own attention.

    python -m benchmarks.kernels.kernel_times [--only decode_attention] [--out DIRECTORY]  # on a CUDA device
    python -m benchmarks.kernels.kernel_times --interpret  # tiny, on the CPU: does it run?

The floor of a row is the bytes that must move (inputs once, outputs once; of packed slots the packed ones) by the
bandwidth of a device copy, measured in the same run. Times are of the device alone, with a cold L2 cache: median, 20th
and 80th percentile. Writes ``kernels.csv``, ``kernels.json`` and ``kernels.md``. What ran in the interpreter says
nothing about speed.
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

from benchmarks.kernels.cases import SHAPES, TINY, Case, cases
from keepkv.measure.environment import revision, versions

ROOT = Path(__file__).parents[2]
FLUSH = 1 << 29  # bytes written between runs: more than any L2 cache holds


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
