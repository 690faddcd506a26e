"""More models like the embedded one, from other seeds, so that no conclusion rests on one of them.

    python -m benchmarks.embedded_model.seeds --out ../seeds --seeds 1 2 3     # two hours each on two cores
    python -m benchmarks.embedded_model.seeds --out ../seeds --seeds 1 2 --short   # a sixth of that
    python -m benchmarks.embedded_model.seeds --out ../seeds --seeds 1 2 3 --parallel --device cuda --loaders 4

Each seed has its own first weights and its own data; the tokenizer is the embedded model's, so that all of them read
the same tokens. The stages are the embedded model's, one of them less; ``--short`` has a sixth of their tokens, in
texts of 1,152 at most. What is written is rounded to bfloat16.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from keepkv.embedded import embedded_model

LENGTHS = "256:0.45:8192,640:0.35:8960,2304:0.2:18432"


@dataclass(frozen=True)
class Stage:
    """tokens: of training. rate: peak. curriculum, mix: as ``benchmarks.embedded_model.train`` takes them."""

    tokens: int
    rate: str
    curriculum: str
    mix: str = ""
    mixed: bool = True


STAGES = (
    Stage(3_800_000, "4e-3", "128:0.24:4096,512:0.34:4096,2304:0.42:4608", mixed=False),
    Stage(10_500_000, "4e-3", "256:0.35:4096,640:0.35:4480,2304:0.3:4608", mixed=False,
          mix="dense:0.02,dense_alike:0.07,in_text:0.03,in_text_alike:0.12,multivalue:0.11,multiquery:0.08,"
              "variables:0.1,counting:0.1,rules:0.12,plain:0.01,long_values:0.07,noise:0.02,answering:0.12,"
              "frequencies:0.1,copying:0.05,sorting:0.04,adding:0.04"),
    Stage(10_000_000, "2.5e-3", "256:0.25:8192,640:0.35:8960,2304:0.4:18432",
          mix="dense:0.02,dense_alike:0.05,in_text:0.02,in_text_alike:0.08,multivalue:0.09,multiquery:0.05,"
              "variables:0.07,counting:0.06,rules:0.08,secrets:0.12,plain:0.01,long_values:0.13,noise:0.01,"
              "answering:0.12,frequencies:0.16,copying:0.05,sorting:0.05,adding:0.06"),
    Stage(6_000_000, "2e-3", LENGTHS,
          mix="dense:0.01,dense_alike:0.03,in_text:0.01,in_text_alike:0.06,multivalue:0.06,multiquery:0.03,"
              "variables:0.04,counting:0.03,rules:0.15,secrets:0.2,plain:0.01,long_values:0.13,noise:0.01,"
              "answering:0.12,frequencies:0.08,copying:0.04,sorting:0.04,adding:0.04"),
)  # fmt: skip
SHORT = (
    Stage(3_200_000, "4e-3", "128:0.3:4096,512:0.4:4096,1152:0.3:4608", mixed=False),
    Stage(1_700_000, "3e-3", "256:0.45:8192,640:0.35:8960,1152:0.2:9216",
          mix="dense:0.01,dense_alike:0.08,in_text:0.03,in_text_alike:0.15,multivalue:0.11,multiquery:0.06,"
              "variables:0.1,counting:0.06,rules:0.1,secrets:0.04,plain:0.01,long_values:0.12,noise:0.01,"
              "answering:0.12"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="one folder a seed is made in it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--short", action="store_true", help="a sixth of the tokens, in shorter texts")
    parser.add_argument("--workers", type=int, default=2, help="processes that share each step on a CPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--loaders", type=int, default=0, help="processes that make the data ahead, for each seed")
    parser.add_argument("--parallel", action="store_true", help="all seeds at once, each with a log beside its folder")
    parser.add_argument("--eager", action="store_true", help="as benchmarks.embedded_model.train takes it")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(a.seeds) if a.parallel else 1) as pool:
        list(pool.map(lambda seed: _train(seed, a), a.seeds))


def _train(seed: int, a: argparse.Namespace) -> None:
    options = ["--workers", str(a.workers), "--device", a.device, "--loaders", str(a.loaders)] + ["--eager"] * a.eager
    out = a.out / f"seed-{seed}"
    train(seed, out, SHORT if a.short else STAGES, options, out.with_name(f"{out.name}.log") if a.parallel else None)


def train(seed: int, out: Path, stages: Sequence[Stage], options: list[str], log: Path | None = None) -> None:
    """All ``stages``; one that lies there is not trained again. options: arguments of the training of each."""
    last = None
    for number, stage in enumerate(stages, start=1):
        here = out.with_name(f"{out.name}.stage-{number}")
        if not (here / "done").exists():
            began = time.monotonic()
            run(stage, 100 * seed + number, last, here, options, log)
            (here / "done").touch()
            print(f"seed {seed}, stage {number}: {time.monotonic() - began:.0f} s", flush=True)
        last = here
    assert last is not None
    shutil.copytree(last, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("done", "*.safetensors"))
    AutoModelForCausalLM.from_pretrained(last, dtype=torch.bfloat16).save_pretrained(out)


def run(stage: Stage, seed: int, start: Path | None, out: Path, options: list[str], log: Path | None) -> None:
    """One stage, in processes whose allocator keeps its memory from step to step."""
    command = [sys.executable, "-m", "benchmarks.embedded_model.train", "--out", str(out), "--seed", str(seed),
               "--tokens", str(stage.tokens), "--rate", stage.rate, "--curriculum", stage.curriculum,
               "--mix", stage.mix, *options]  # fmt: skip
    # Training a tokenizer anew gives another one under another version of Python.
    command += ["--mixed"] * stage.mixed + (["--start", str(start)] if start else ["--tokenizer", embedded_model()])
    keep = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33), "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0"}  # fmt: skip  # the items of ``secrets`` go by the order of a set
    with nullcontext() if log is None else log.open("a") as to:
        subprocess.run(command, check=True, env=os.environ | keep, stdout=to, stderr=to)


if __name__ == "__main__":
    main()
