"""``keepkv report``: one page, figures and a table from the directory of an evaluation."""

from __future__ import annotations

import gc
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from typer import Option

from keepkv.cli.options import AsJson
from keepkv.cli.output import one_line_errors, print_json, progress
from keepkv.errors import KeepKVError


@one_line_errors
def report(
    directories: Annotated[
        list[str], typer.Argument(metavar="DIR", help="What an evaluation wrote; several are joined.")
    ],
    out: Annotated[str | None, Option(help="Where to write; DIR itself if absent. Needed for several.")] = None,
    show: Annotated[bool, Option("--open", help="Open the page in a browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the report of an evaluation, or of several as one: report.html, report.md and figures/*.png.

    Several directories are joined where they are of one model and one setting, and agree where they overlap. The page
    is one file that fetches nothing. The figures need matplotlib: pip install 'keepkv[plots]'.

    \b
    Examples:
      keepkv report results
      keepkv report results --out report --open
      keepkv report results more-results --out report
      keepkv report results --json
    """
    from keepkv.report import arrange, join, read, steps, write

    if len(directories) > 1 and out is None:
        raise KeepKVError("several directories are joined in a new one: name it with --out DIRECTORY")
    with progress(len(directories) + 1 + steps()) as step:
        parts = []
        for one in directories:
            step(f"reading {one}")
            parts.append(read(one))
        step("pooling scores")
        with _kept():
            found = arrange(join(parts))
            written = write(found, out or directories[0], step)
    if as_json:
        figures = [str(path) for path in written.figures]
        print_json({"page": str(written.page), "table": str(written.table), "figures": figures, "notes": found.notes})
    else:
        for note in found.notes:
            typer.echo(f"note: {note}", err=True)
        if not written.figures:
            typer.echo("note: no PNGs without matplotlib: pip install 'keepkv[plots]'", err=True)
        size = written.page.stat().st_size / 1e6
        typer.echo(f"wrote {written.page} ({size:.1f} MB), {written.table} and {len(written.figures)} figures")
    if show:
        webbrowser.open(written.page.resolve().as_uri())


@contextmanager
def _kept() -> Iterator[None]:
    """Inside, what there is stays: nobody need look through a hundred thousand rows for garbage, each time anew."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
