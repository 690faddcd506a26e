"""The study of ``keepkv2`` against its rivals, on several models, in as much time as there is.

    python -m benchmarks.keepkv2.run --work DIR --models embedded=embedded seed-1=PATH seed-2=PATH seed-3=PATH \\
        --workers 16 --limit 400 [--parts agnostic fidelity lengths aware decode ablation] [--share 1.0]
    python -m benchmarks.keepkv2.tables --work DIR

Parts, methods, tasks and items stand in ``plan.py``. A part is cut into jobs, a model × task × length each, one call
of ``keepkv.evaluation`` that writes to ``DIR/MODEL/PART/TASK-LENGTH`` and goes on where it was stopped. The path
``embedded`` is the model that comes with the package.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  # once, before workers are forked

from keepkv.cli.arguments import variant
from keepkv.cli.load import load
from keepkv.evaluation.rows import ITEMS, RUN
from keepkv.evaluation.runner import evaluate, total
from keepkv.methods import METHODS

from . import fidelity
from .plan import PARTS, Job, Model, jobs
from .pool import drain

MODELS, SPENT = "models.json", "seconds.json"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="what is unfinished is kept and resumed here")
    parser.add_argument("--models", nargs="+", default=["embedded=embedded"], metavar="NAME=PATH")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=86400.0, help="seconds, after which all is stopped")
    parser.add_argument("--parts", nargs="*", default=[], help=f"of {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--tasks", nargs="*", default=[], help="only these")
    parser.add_argument("--share", type=float, default=1.0, help="of the items")
    a = parser.parse_args(words)
    began = time.monotonic()
    torch.set_num_threads(1)
    planned = [job for job in jobs(models(a.work, a.models), a.parts, a.share) if not a.tasks or job.task in a.tasks]
    for label in dict.fromkeys(label for job in planned for label in job.part.methods):
        one = variant(label)
        METHODS.build(one.method, **one.options)  # a wrong one fails here, before all else
    opened = [job for job in planned if not finished(job, a.work)]
    print(f"{len(planned)} jobs, {len(planned) - len(opened)} of them done, {sum(j.guess for j in opened):.0f} core-s")
    spent = drain(opened, partial(run, work=a.work), a.workers, a.limit, guess, partial(print, flush=True))
    (a.work / SPENT).write_text(
        json.dumps(held_seconds(a.work) | {str(j.where): s for j, s in spent.items()}, indent=1)
    )
    for part in dict.fromkeys(job.part.name for job in planned):
        mine = [seconds for job, seconds in spent.items() if job.part.name == part]
        print(f"{part}: {len(mine)} jobs, {sum(mine):.0f} core-seconds")
    print(f"{time.monotonic() - began:.0f} s; {len(opened) - len(spent)} jobs unfinished")


def models(work: Path, named: Sequence[str]) -> list[Model]:
    """``NAME=PATH`` each; a name keeps the items that it was given when ``work`` first saw it."""
    work.mkdir(parents=True, exist_ok=True)
    known = json.loads((work / MODELS).read_text()) if (work / MODELS).exists() else {}
    found = []
    for text in named:
        name, _, path = text.partition("=")
        found.append(Model(name, path or name, known.setdefault(name, len(known))))
    (work / MODELS).write_text(json.dumps(known, indent=1) + "\n")
    return found


def run(job: Job, work: Path) -> None:
    """Runs or resumes one job."""
    model, tokenizer = loaded(job.model.path)
    folder = work / job.where
    folder.mkdir(parents=True, exist_ok=True)
    (fidelity.evaluate if job.part.name.startswith("fidelity") else evaluate)(model, tokenizer, job.setup(), folder)


@lru_cache
def loaded(path: str) -> tuple[Any, Any]:
    """Model and tokenizer, once in each process."""
    torch.set_num_threads(1)
    return load(None if path == "embedded" else str(Path(path).absolute()), "cpu")


def guess(job: Job, done: dict[Job, float]) -> float:
    """As long as the same for another model, or as planned, corrected by how wrong plans were."""
    same = [s for j, s in done.items() if (j.part, j.task, j.length) == (job.part, job.task, job.length)]
    if same:
        return max(same)
    wrong = [s / j.guess for j, s in done.items() if j.part == job.part] or [s / j.guess for j, s in done.items()]
    return job.guess * (median(wrong) if wrong else 1.0)


def finished(job: Job, work: Path) -> bool:
    """Whether just this was run, and to its end."""
    run, items = work / job.where / RUN, work / job.where / ITEMS
    if not (run.exists() and items.exists()):
        return False
    setup = json.loads(json.dumps(job.setup().to_dict()))
    same = setup.items() <= json.loads(run.read_text()).items()
    return same and items.read_bytes().count(b"\n") == total(job.setup())


def held_seconds(work: Path) -> dict[str, float]:
    """What earlier calls took."""
    path = work / SPENT
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    main()
