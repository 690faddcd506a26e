"""Rows of a measurement as they come: kept in a folder at once, then shown, drawn, and said where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer

from keepkv.cli.output import print_json, progress_rows


def deliver(
    measure: Callable[[Any], Iterable[Any]],
    count: int,
    kept: str,
    into: Path | None,
    as_json: bool,
    show: Callable[[list[Any]], None],
    draw: Callable[[list[Any], Path], object] | None,
) -> list[Any]:
    """The rows of ``measure``, which takes what it tells its progress.

    count: rows that may come. kept: what is said where it is interrupted. into: folder that each row is written to.
    show: for a reader, in the place of JSON. draw: plots into the folder; None: no plots.
    """
    from keepkv.measure.files import write

    rows: list[Any] = []
    with progress_rows(count, kept) as step:
        for row in measure(step):
            rows.append(row)
            if into is not None:
                write(rows, into, "bench")  # what is measured is kept, whatever comes
    if as_json:
        print_json([row.to_dict() for row in rows])
    else:
        show(rows)
    if into is not None and draw is not None:
        draw(rows, into)
    if into is not None and not as_json:
        typer.echo(f"wrote {into}")
    return rows
