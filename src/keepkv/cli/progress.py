"""How far long work is, on stderr: a bar for a person who watches, else a plain line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

Step = Callable[[str], None]
Advance = Callable[[int, str], None]


class How(str, Enum):
    """How progress is shown. auto: a bar where a person watches, else plain lines once the work has taken a while."""

    auto = "auto"
    plain = "plain"
    none = "none"


VARIABLE = "KEEPKV_PROGRESS"
ANEW = "Nothing was written; the same command starts anew."
SOON, LATE, NEXT = 0.5, 5.0, 30.0  # seconds before the first plain line, if it was asked for or not, and between two
chosen: ContextVar[How] = ContextVar("keepkv_progress", default=How.auto)


@dataclass
class Work:
    """How far some work is. what: is done now. done: of ``total`` parts; a total of 0 is work without parts. counted:
    whether ``done`` counts the part that is being worked on too."""

    total: int = 0
    counted: bool = False
    what: str = ""
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    def count(self) -> str:
        """``2 of 11``."""
        return f"{min(self.done, self.total)} of {self.total}" if self.total else ""

    def left(self) -> str:
        """``about 3 min left``, as far as the time taken until now tells; empty where it does not."""
        whole, seconds = self.done - self.counted, time.monotonic() - self.began
        return f"about {_duration(seconds / whole * (self.total - whole))} left" if 0 < whole < self.total else ""

    def where(self) -> str:
        """``at 2 of 11, keydiff`` or ``while loading a model``."""
        return f"at {_joined(self.count(), self.what)}" if self.total else f"while {self.what}"

    def __str__(self) -> str:
        return _joined(self.what, self.count(), f"{_duration(time.monotonic() - self.began)} so far", self.left())


def resume(out: str | None) -> str:
    """How to go on with a verb that finds in the directory ``out`` what it has done already."""
    if out is None:
        return "Nothing was written; with --out DIRECTORY the same command could go on."
    return f"What is done is in {out}; give the same command again to go on."


@contextmanager
def progress(total: int, after: str = ANEW) -> Iterator[Step]:
    """Yields a function that says which part of the work begins now. after: how to go on after Ctrl-C."""
    work = Work(total, counted=True)
    with _shown(work, after):

        def step(what: str) -> None:
            work.what, work.done = what, work.done + 1

        yield step


@contextmanager
def progress_rows(total: int, after: str = ANEW) -> Iterator[Advance]:
    """Yields a function that adds rows which are done, and says what comes next. after: how to go on after Ctrl-C."""
    work = Work(total)
    with _shown(work, after):

        def advance(rows: int, what: str) -> None:
            work.what, work.done = what or work.what, work.done + rows

        yield advance


@contextmanager
def waiting(what: str, after: str = ANEW) -> Iterator[None]:
    """Says that ``what`` takes a while; it has no parts."""
    with _shown(Work(what=what), after):
        yield


@contextmanager
def moving() -> Iterator[Callable[[str], None]]:
    """Yields a function that shows a line in the place of the last one; a plain one now and then if nobody watches."""
    how, last = chosen.get(), time.monotonic()
    if how is How.auto and sys.stderr.isatty():
        with Console(stderr=True).status("") as status:
            yield status.update
        return

    def show(line: str) -> None:
        nonlocal last
        if how is not How.none and time.monotonic() - last > NEXT:
            print(line, file=sys.stderr, flush=True)
            last = time.monotonic()

    yield show


@contextmanager
def _shown(work: Work, after: str) -> Iterator[None]:
    how: AbstractContextManager[Any] = nullcontext()
    if chosen.get() is How.auto and sys.stderr.isatty():
        how = _bar(work) if work.total else Console(stderr=True).status(work.what)
    elif chosen.get() is not How.none:
        how = _lines(work, SOON if chosen.get() is How.plain else LATE if work.total else NEXT)
    try:
        with how:
            yield
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(str(stopped) or f"{work.where()}. {after}") from None


@contextmanager
def _bar(work: Work) -> Iterator[None]:
    columns = (
        _Said(Column(no_wrap=True, overflow="ellipsis", ratio=1)), BarColumn(None, table_column=Column(ratio=1)),
        _Counted(Column(no_wrap=True)),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4, expand=True) as bar:
        bar.add_task("", total=work.total, work=work)
        yield


class _Said(ProgressColumn):
    """What is done now."""

    def render(self, task: Task) -> Text:
        work: Work = task.fields["work"]
        task.completed = work.done - work.counted
        return Text(work.what)


class _Counted(ProgressColumn):
    """Count, and time left."""

    def render(self, task: Task) -> Text:
        work: Work = task.fields["work"]
        return Text("  ".join((work.count(), work.left())))


@contextmanager
def _lines(work: Work, first: float) -> Iterator[None]:
    over = threading.Event()

    def watch() -> None:
        wait = first
        while not over.wait(wait):
            print(work, file=sys.stderr, flush=True)
            wait = NEXT

    thread = threading.Thread(target=watch, name="keepkv-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 5 min``."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
