"""What the study of ``keepkv2`` runs: parts, their methods, tasks and budgets, and the jobs that they are cut into.

Edit ``METHODS`` and ``ABLATION`` here. ``seconds`` were measured on one core of a shared Xeon, and only decide which
jobs are thought to fit into the time before any like them is finished.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from keepkv.cli.arguments import variant
from keepkv.core.budget import Budget
from keepkv.evaluation.setup import Setup

OURS = "keepkv2"
METHODS = (
    OURS, "keepkv2:merge=0.8", "snapkv", "adakv", "adakv:score=keydiff", "expected-attention", "kvzip", "compactor",
    "keydiff", "attention-matching", "grkv", "grkv:score=keydiff", "reskv", "reskv:score=keydiff", "keepkv",
    "keepkv:key=bias", "keepkv:key=zip", "keepkv:key=code", "random", "streaming-llm",
)  # fmt: skip
DECODING = (
    OURS, "keepkv2:queries=0", "g-kv", "r-kv", "keydiff", "snapkv", "streaming-llm", "random",
)  # fmt: skip
# Without those that do as another of the same kind does, or nearly.
LONG = tuple(name for name in METHODS if name not in ("grkv", "reskv", "keepkv:key=zip", "keepkv:key=code"))
# keepkv2 without one of its parts, or with another in its place; full, random and snapkv always run beside them.
ABLATION = (
    OURS, "keepkv2:merge=0.8", "keepkv2:merge=-1.0", "keepkv2:queries=0", "keepkv2:queries=32", "keepkv2:kernel=1",
    "keepkv2:kernel=7", "keepkv2:floor=1.0", "keepkv2:floor=20.0", "keepkv2:ridge=0.1", "keepkv2:score=keydiff",
    "keepkv2:score=kvzip", "keepkv2:allocate=uniform", "keepkv2:allocate=adakv",
    "keepkv2:safeguard=0.5",
)  # fmt: skip

BUDGETS = (0.05, 0.075, 0.1, 0.15, 0.2, 0.3)
FEW = (0.1, 0.2, 0.3)
MANY = (  # eight or four questions on each context
    "niah-multikey-1", "niah-multikey-2", "niah-multikey-3", "qa-1", "qa-2", "niah-multivalue", "niah-multiquery",
    "variable-tracking", "shared-context",
)  # fmt: skip
ONE = ("niah-single-1", "niah-single-2", "niah-single-3", "common-words", "frequent-words", "secret")  # or two
SUITE = MANY + ONE
SOME = (
    "niah-multikey-1", "niah-multikey-2", "niah-multikey-3", "qa-1", "niah-single-1", "common-words",
    "niah-multivalue", "variable-tracking",
)  # fmt: skip
# What a method that rehearses is told may be asked: of other kinds than the task's, about other texts.
QUESTIONS = json.loads((Path(__file__).parent / "questions.json").read_text())
KINDS = {
    "facts": ("niah", "shared", "secret"),
    "reading": ("qa",),
    "variables": ("variable",),
    "words": ("common", "freq"),
}
REHEARSED, NEAREST = ("keepkv2:rehearsed=True",), (OURS, "kvzip", "compactor", "keydiff")
PROMPT = 100  # tokens: no prompt of long-decode at a length of 96 has more than 97


@dataclass(frozen=True)
class Part:
    """One question of the study. items: contexts of a task of ``MANY``, and of any other.

    sinks, window: tokens that every method keeps. questions: whether methods that rehearse are told any, or
    have the text alone. seconds: of one core for an item of the first of ``lengths``, by the
    same two kinds of task.
    """

    name: str
    tasks: tuple[str, ...]
    items: tuple[int, int]
    budgets: tuple[float | int, ...] = FEW
    lengths: tuple[int, ...] = (1024,)
    methods: tuple[str, ...] = METHODS
    mode: str = "agnostic"
    sinks: int = 4
    window: int = 16
    seconds: tuple[float, float] = (3.0, 2.0)
    questions: bool = True


def of_bytes(budgets: Sequence[float | int]) -> tuple[float | int | str, ...]:
    """Budgets of the study, where a share is one of the bytes, as ``keepkv.evaluation`` takes them."""
    return tuple(b if isinstance(b, int) else Budget(share_of_bytes=b).value for b in budgets)


def bare(budget: float | int | str) -> float | int | str:
    """A budget of ``keepkv.evaluation`` as the files of the study have it."""
    share = Budget.of(budget).share_of_bytes
    return budget if share is None else share


@dataclass(frozen=True)
class Model:
    """draw: which items it is given, others than any other model, so that intervals may take them as independent."""

    name: str
    path: str
    draw: int


@dataclass(frozen=True)
class Job:
    """One call of the evaluation: a model, a task, a length."""

    part: Part
    model: Model
    task: str
    length: int
    items: int

    @property
    def where(self) -> Path:
        """Its folder, below that of the study."""
        return Path(self.model.name, self.part.name, f"{self.task}-{self.length}")

    @property
    def guess(self) -> float:
        """Seconds of one core, before any is measured."""
        longer = (self.length / self.part.lengths[0]) ** 1.25
        return self.items * self.part.seconds[self.task not in MANY] * longer

    def setup(self) -> Setup:
        """As ``keepkv.evaluation`` takes it."""
        part = self.part
        return Setup(
            model=self.model.name,
            tasks=(self.task,),
            variants=tuple(map(variant, part.methods)),
            budgets=of_bytes(part.budgets),
            lengths=(self.length,),
            modes=(part.mode,),
            items=self.items,
            seeds=(self.model.draw,),
            sinks=part.sinks,
            window=part.window,
            questions=foreign(self.task) if part.questions else (),
        )


def foreign(task: str) -> tuple[tuple[str, str], ...]:
    """Questions of other kinds than those of ``task``."""
    kinds = [kind for kind, starts in KINDS.items() if not task.startswith(starts)]
    return tuple((question, reply) for kind in kinds for question, reply in QUESTIONS[kind])


# The most important first: what does not fit into the time is the end of this list.
PARTS = (
    Part("agnostic", SUITE, (11, 14), BUDGETS, seconds=(4.0, 2.7)),
    Part("fidelity", SOME, (5, 5), methods=METHODS + REHEARSED, seconds=(2.3, 1.8)),
    Part("ablation", SOME, (7, 10), (0.1, 0.2), methods=ABLATION, seconds=(2.4, 1.5)),
    Part("decode", ("long-decode",), (12, 12), (48, 64, 96), (96,), DECODING, seconds=(4.5, 4.5)),
    Part("aware", SOME, (1, 6), mode="aware", seconds=(10.7, 1.8)),
    Part("lengths", SUITE, (2, 3), lengths=(512, 2048), methods=LONG, seconds=(1.1, 0.75)),
    Part("rehearsed", SUITE, (6, 7), BUDGETS, methods=(*REHEARSED, *NEAREST), seconds=(7.0, 3.0)),
    Part("fidelity-text", SOME, (5, 5), methods=REHEARSED, seconds=(4.0, 3.0), questions=False),
    # Where every method keeps the prompt, these replies need nothing else: all score as the full cache.
    Part("decode-kept", ("long-decode",), (4, 4), tuple(PROMPT + n for n in (8, 16, 32)), (96,), DECODING,
         sinks=PROMPT, window=4, seconds=(4.5, 4.5)),
)  # fmt: skip


def jobs(models: Sequence[Model], names: Sequence[str] = (), share: float = 1.0) -> Iterator[Job]:
    """Those of the parts ``names``, all without any: part after part, in a part the short contexts first,
    of these the jobs that take longest.

    share: of the items, at least one each.
    """
    if unknown := set(names) - {part.name for part in PARTS}:
        raise SystemExit(f"no part {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in PARTS)}")
    for part in PARTS:
        if not names or part.name in names:
            made = [
                Job(part, model, task, length, max(1, round(part.items[task not in MANY] * share)))
                for length in part.lengths
                for task in part.tasks
                for model in models
            ]
            yield from sorted(made, key=lambda job: (job.length, -job.guess))
