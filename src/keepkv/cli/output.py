"""What every verb prints through: results on stdout, errors on stderr, JSON for machines."""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import typer
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from keepkv.cli.progress import ANEW, Advance, Step, progress, progress_rows, resume, waiting
from keepkv.errors import KeepKVError

if TYPE_CHECKING:
    from keepkv.measure.interval import Estimate

__all__ = [
    "Advance", "Step", "console", "listing", "one_line_errors", "plus_minus", "print_json", "progress", "progress_rows",
    "resume", "table", "waiting",
]  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")
STOPPED = 130  # what a shell expects of a command that Ctrl-C ended


def console() -> Console:
    """The console of stdout as it is now: tests and shells redirect it."""
    return Console(highlight=False)


def one_line_errors(verb: Callable[P, R]) -> Callable[P, R]:
    """Errors that keepkv raises on purpose end the verb with one line on stderr and exit code 2, not a traceback;
    Ctrl-C ends it with a line that says what was stopped and how to go on, and exit code 130."""

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _note
                return verb(*args, **kwargs)
        except KeepKVError as error:
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stopped:
            print(f"\nstopped{f' {stopped}' if str(stopped) else f'. {ANEW}'}", file=sys.stderr)
            raise typer.Exit(STOPPED) from None

    return run


def _note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """A warning as a line for people, without the place in the source that gave it."""
    print(f"note: {' '.join(str(message).split())}", file=sys.stderr)


def print_json(value: object) -> None:
    """``value`` as indented JSON on stdout; dataclasses as objects, anything else unknown as its ``repr``."""
    from keepkv.measure.rows import plain

    json.dump(plain(value), sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def table(*columns: str, left: int = 1) -> Table:
    """A table whose first ``left`` columns are text and whose others are numbers. No name or number is broken; headings
    and text are where the terminal is narrow."""
    made = _Table(header_style="bold", box=None, pad_edge=False)
    made.left = left
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i < left else "right", overflow="fold")
    return made


def plus_minus(estimate: Estimate, times: int = 1, digits: int = 3) -> str:
    """``0.512±0.031``: ``times`` the mean, and half of its 95 % interval where there is one."""
    mean = f"{times * estimate.mean:.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return mean
    return f"{mean}±{times * (estimate.high - estimate.low) / 2:.{digits}f}"


def listing(rows: Iterable[tuple[str, Any]]) -> None:
    """Print labels and values, a line each."""
    made = Table(box=None, pad_edge=False, show_header=False)
    made.add_column(no_wrap=True)
    made.add_column()
    for label, value in rows:
        made.add_row(label, escape(str(value)))
    console().print(made)


_TEXT = 20  # columns at least for text that may be wrapped, where it is as long


class _Table(Table):
    """Where the terminal is too narrow for it, each row is its name, and what the columns say of it below. left: of the
    columns, how many are text; all but the first may be wrapped."""

    left: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for i, column in enumerate(self.columns):
            _narrowest(column, wraps=0 < i < self.left)
        if Measurement.get(console, options.update(width=10_000), self).minimum <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        labels = [str(column.header) for column in self.columns[1:]]
        for name, *cells in zip(*(list(column.cells) for column in self.columns), strict=True):
            yield Text(str(name), style="bold")
            said = [_pair(label, str(cell)) for label, cell in zip(labels, cells, strict=True) if str(cell)]
            yield Padding(Text("  ").join(said), (0, 0, 0, 2))


def _narrowest(column: Column, wraps: bool) -> None:
    """How narrow a column may become: what is in it stays whole unless it ``wraps``, the words of its heading do."""
    cells = max((Text.from_markup(str(one)).cell_len for one in column.cells), default=0)
    words = max((len(word) for word in str(column.header).split()), default=0)
    column.min_width = max(words, min(_TEXT, cells) if wraps else cells)
    column.no_wrap = not wraps and len(str(column.header)) <= cells


def _pair(label: str, cell: str) -> Text:
    """What a column says, behind its name; a number is not torn from it."""
    space = "\N{NO-BREAK SPACE}" if len(cell) <= 12 else " "
    said = Text(f"{label} ".replace(" ", space) if label else "", style="dim")
    return said.append(cell.replace(" ", space), style="not dim")
