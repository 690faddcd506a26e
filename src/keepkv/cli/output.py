"""What every verb prints through: results on stdout, progress and errors on stderr, JSON for machines."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from keepkv.errors import KeepKVError
from keepkv.measure.rows import plain

P = ParamSpec("P")
R = TypeVar("R")
Step = Callable[[str], None]
Advance = Callable[[int, str], None]


def console() -> Console:
    """The console of stdout as it is now: tests and shells redirect it."""
    return Console(highlight=False)


def one_line_errors(verb: Callable[P, R]) -> Callable[P, R]:
    """Errors that keepkv raises on purpose end the verb with one line on stderr and exit code 2, not a traceback."""

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return verb(*args, **kwargs)
        except KeepKVError as error:
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
            raise typer.Exit(2) from None

    return run


def print_json(value: object) -> None:
    """``value`` as indented JSON on stdout; dataclasses as objects, anything else unknown as its ``repr``."""
    json.dump(plain(value), sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def table(*columns: str, left: int = 1) -> Table:
    """A table whose first ``left`` columns are text and whose others are numbers."""
    made = Table(header_style="bold", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i < left else "right", overflow="fold")
    return made


def _bar(*columns: ProgressColumn, **more: Any) -> Progress:
    """A bar on stderr; silent unless a person watches."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), *columns, console=Console(stderr=True),
        disable=not sys.stderr.isatty(), transient=True, refresh_per_second=4, **more,
    )  # fmt: skip


@contextmanager
def progress_rows(total: int) -> Iterator[Advance]:
    """Yields a function that advances a bar by some rows and says what comes next; the bar has rate and time left."""
    rate = TextColumn("{task.fields[rate]}")
    with _bar(MofNCompleteColumn(), rate, TimeRemainingColumn(), speed_estimate_period=600) as bar:
        task = bar.add_task("", total=total, rate="")

        def advance(rows: int, what: str) -> None:
            speed = bar.tasks[0].speed
            bar.update(task, advance=rows, rate="" if speed is None else f"{speed:.1f}/s")
            if what:
                bar.update(task, description=what)

        yield advance


@contextmanager
def progress(total: int) -> Iterator[Step]:
    """Yields a function that says what comes next and advances a bar."""
    with _bar(TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=total, completed=-1)  # nothing is done when the first step begins
        yield lambda what: bar.update(task, description=what, advance=1)
