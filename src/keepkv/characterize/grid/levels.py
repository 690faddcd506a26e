"""The four levels of a grid, and a point: one choice of each."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from keepkv.characterize.grid.lengths import Lengths
from keepkv.core.budget import Budget
from keepkv.core.options import Checked, Positive, Share, Size, one_of
from keepkv.core.when import When
from keepkv.errors import KeepKVError
from keepkv.measure.rows import method_label, plain

SCHEMA = 1  # of rows and hashes; ``record.migrate`` reads older ones
ARRIVALS = ("closed", "poisson", "gamma", "trace")
WEIGHTS = ("none", "bf16", "torchao-int8", "torchao-int4", "quanto-int8", "quanto-int4", "hqq-int8", "hqq-int4")
CHECKPOINT = "checkpoint:"  # and a directory or Hub name: GPTQ or AWQ weights of the same model
FULL = "full"
Role = Literal["point", "baseline", "start", "end"]


@dataclass(frozen=True)
class Application(Checked):
    """What is asked. tasks: of ``keepkv tasks``; each is a family. text: a file of one's own, of which pieces are read
    and questions asked; questions: pairs of question and what the answer must hold, none for free continuation.
    plain: whether tasks are asked in plain English; in a grid file, of every model but the embedded one if absent."""

    name: str
    tasks: tuple[str, ...] = ()
    text: str | None = None
    questions: tuple[tuple[str, str], ...] = ()
    plain: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.tasks) == (self.text is not None):
            raise KeepKVError(f"application {self.name!r}: give either tasks or a text of your own")

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> Application:
        """The application in plain data."""
        return cls(**{**held, "tasks": tuple(held["tasks"]), "questions": tuple(map(tuple, held["questions"]))})


@dataclass(frozen=True)
class Workload(Checked):
    """When requests come and how long they are.

    arrivals: "closed", ``concurrency`` clients that ask again as soon as they are answered; "poisson", ``rate``
    requests a second; "gamma", the same with gaps whose coefficient of variation is ``cv``, above 1 in bursts; "trace",
    as recorded in the file ``trace``, ``speed`` times as fast. n_in: tokens of a prompt. n_out: of a reply; None: as
    the task has it. shared: share of each prompt that all have in common, at its beginning. turns: requests of a
    conversation, each with the earlier ones and their replies in front.
    """

    arrivals: Annotated[str, one_of(*ARRIVALS)] = "closed"
    concurrency: Size = 1
    rate: Positive | None = None
    cv: Positive = 1.0
    trace: str | None = None
    speed: Positive = 1.0
    n_in: Lengths = field(default_factory=Lengths)
    n_out: Lengths | None = None
    shared: Share = 0.0
    turns: Size = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.arrivals in ("poisson", "gamma")) != (self.rate is not None):
            raise KeepKVError(
                f"workload: arrivals {self.arrivals!r} and rate={self.rate}: poisson and gamma take a rate"
            )
        if (self.arrivals == "trace") != (self.trace is not None):
            raise KeepKVError(
                f"workload: arrivals {self.arrivals!r} and trace={self.trace!r}: give a file with 'trace'"
            )

    @property
    def label(self) -> str:
        """``closed 2, 512 in``, ``gamma 1.5/s cv 2, uniform 256-512 in, 16 out``."""
        how = {
            "closed": f"closed {self.concurrency}", "poisson": f"poisson {self.rate:g}/s" if self.rate else "",
            "gamma": f"gamma {self.rate:g}/s cv {self.cv:g}" if self.rate else "",
            "trace": f"trace {self.trace} x{self.speed:g}",
        }[self.arrivals]  # fmt: skip
        said = [how, f"{self.n_in} in"]
        said += [f"{self.n_out} out"] if self.n_out is not None else []
        said += [f"{self.shared:.0%} shared"] if self.shared else []
        said += [f"{self.turns} turns"] if self.turns > 1 else []
        return ", ".join(said)

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> Workload:
        """The workload in plain data."""
        lengths = {
            name: Lengths(held[name]["kind"], tuple(held[name]["values"]))
            for name in ("n_in", "n_out")
            if held[name] is not None
        }
        return cls(**{**held, **lengths})


@dataclass(frozen=True)
class Technique(Checked):
    """How the cache is held. method: of keepkv; "full": transformers' own cache, to which all others are compared.
    budget: as ``keepkv.Budget`` reads it; None for "full". options: of the method, ``store`` and ``codec`` among them.
    """

    method: str = FULL
    budget: int | float | str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == FULL:
            object.__setattr__(self, "budget", None)
        elif self.budget is None:
            raise KeepKVError(f"method {self.method!r} needs a budget: a share of the tokens (0.25) or slots (512)")
        else:
            object.__setattr__(self, "budget", Budget.of(self.budget).value)

    @property
    def label(self) -> str:
        """Method and options as the command line takes them, and the budget: ``snapkv:window=16 @ 0.25``."""
        name = method_label(self.method, self.options)
        return name if self.budget is None else f"{name} @ {self.budget}"

    def made_options(self) -> dict[str, Any]:
        """Options as the cache takes them."""
        when = self.options.get("when")
        return self.options | ({"when": When(**when)} if isinstance(when, dict) else {})


@dataclass(frozen=True)
class Hardware(Checked):
    """Where it runs. threads: of a CPU, torch's own number if None. dtype: "auto" is the model's own. power_cap: watts
    of a GPU, where this user may set it."""

    device: str = "cpu"
    threads: Size | None = None
    dtype: Annotated[str, one_of("auto", "float32", "bfloat16", "float16")] = "auto"
    power_cap: Positive | None = None

    @property
    def label(self) -> str:
        said = [self.device, self.dtype]
        said += [f"{self.threads} threads"] if self.threads is not None else []
        said += [f"{self.power_cap:g} W"] if self.power_cap is not None else []
        return ", ".join(said)


@dataclass(frozen=True)
class Point(Checked):
    """One measurement. role: "baseline" is the full cache that each block has, "start" and "end" are the same baseline
    at both ends of a run, by which drift is seen. block: points of one block are run near each other in time."""

    application: Application
    workload: Workload
    technique: Technique
    weights: str
    hardware: Hardware
    seed: int = 0
    role: str = "point"
    block: int = 0

    @property
    def place(self) -> tuple[str, str, str]:
        """Where techniques are compared with each other: application, workload, hardware."""
        return self.application.name, self.workload.label, self.hardware.label

    @property
    def choice(self) -> str:
        """What is compared: technique and weights."""
        return self.technique.label + ("" if self.weights == "none" else f" + {self.weights}")

    @property
    def is_baseline(self) -> bool:
        """Whether it is the uncompressed cache with the weights as they were saved."""
        return self.technique.method == FULL and self.weights == "none"

    def digest(self, setting: dict[str, Any]) -> str:
        """Sixteen hex digits of everything that decides the measurement; setting: what is the same for all points."""
        said = json.dumps({"schema": SCHEMA, "point": plain(asdict(self)), **setting}, sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a process and for a row."""
        made: dict[str, Any] = plain(asdict(self))
        return made

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> Point:
        """The point that ``to_dict`` gave."""
        made = {
            "application": Application.from_dict(held["application"]), "workload": Workload.from_dict(held["workload"]),
            "technique": Technique(**held["technique"]), "hardware": Hardware(**held["hardware"]),
        }  # fmt: skip
        return cls(**{**held, **made})

    def as_baseline(self, role: Role, block: int) -> Point:
        """The full cache at the same place."""
        return replace(self, technique=Technique(), weights="none", role=role, block=block)
