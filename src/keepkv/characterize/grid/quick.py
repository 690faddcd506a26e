"""The quick profile: every column in under five minutes on two cores, with the model inside the package."""

from __future__ import annotations

from keepkv.characterize.grid.lengths import Lengths
from keepkv.characterize.grid.levels import Application, Hardware, Technique, Workload
from keepkv.characterize.grid.read import Grid, Phases


def quick() -> Grid:
    """The grid of ``keepkv characterize --profile quick``. Its windows are too short to compare methods by."""
    return Grid(
        applications=(Application("facts", tasks=("niah-single-1", "variable-tracking")),),
        workloads=(
            Workload(concurrency=2, n_in=Lengths("fixed", (256,))),
            Workload("poisson", rate=1.0, n_in=Lengths("uniform", (160, 256))),
        ),
        techniques=(Technique("snapkv", 0.5), Technique("keepkv", 0.5)),
        hardware=(Hardware("cpu", threads=1, dtype="float32"),),
        limits={"ttft": 2.0, "tpot": 0.5},
        phases=Phases(warm_least=3, warm_most=4, seconds=4.0, requests=8, most_seconds=30.0, idle=0.5),
        timeout=600.0,
    )  # fmt: skip
