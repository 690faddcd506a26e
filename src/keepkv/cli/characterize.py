"""``keepkv characterize``: speed, energy and quality of the same requests, with each way to hold the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from keepkv.cli.options import AsJson, Import, Texts
from keepkv.cli.output import console, one_line_errors, print_json, progress_rows, resume, table
from keepkv.errors import KeepKVError

if TYPE_CHECKING:
    from keepkv.characterize.record.rows import ResultRow

SHOWN = ("score", "ratio", "ttft_p50", "tpot_p50", "output_per_s", "j_per_output_token")


@one_line_errors
def characterize(
    grid: Annotated[str | None, Argument(metavar="GRID.yaml", help="What to measure: docs/characterize.md.")] = None,
    profile: Annotated[str | None, Option(help="quick: every column in minutes, on the embedded model.")] = None,
    out: Annotated[str, Option(help="Directory of the run; the same command goes on with it.")] = "characterization",
    endpoint: Annotated[
        str | None, Option(metavar="URL", help="Drive this OpenAI-compatible server, whatever it runs.")
    ] = None,
    results: Annotated[
        Texts,
        Option("--results", metavar="FILE", help="Add results of guidellm, vllm bench serve or aiperf. Repeatable."),
    ] = None,
    method: Annotated[str, Option("--method", "-m", help="What --results were measured with.")] = "full",
    plan_only: Annotated[bool, Option("--plan", help="Show what would be run, and what is dropped and why.")] = False,
    imports: Import = None,
    as_json: AsJson = False,
) -> None:
    """Measure speed, energy and quality of the same requests with each way to hold the cache.

    A grid has four levels: application, workload, method, hardware. Each point is a process of its own; blocks come in
    random order, the uncompressed cache in each. A point that fails is a row. Where there is no sensor of energy, its
    columns stay empty.

    \b
    Examples:
      keepkv characterize --profile quick
      keepkv characterize grid.yaml --out run
      keepkv characterize grid.yaml --out run --endpoint http://127.0.0.1:8000
      keepkv characterize --out run --results guidellm.json
    """
    from keepkv.characterize.grid.quick import quick
    from keepkv.characterize.grid.read import read_grid
    from keepkv.report.characterization import run_pages, write_pages

    if results:
        if grid is not None or profile is not None:
            raise KeepKVError("--results adds rows of other tools to a run: give it alone, with --out")
        found = _added(results, method, out)
    else:
        if (grid is None) == (profile is None):
            raise KeepKVError("give a grid file, or --profile quick")
        if profile not in (None, "quick"):
            raise KeepKVError(f"profile {profile!r}: there is quick; anything else is a grid file")
        asked = quick() if grid is None else read_grid(grid)
        asked = asked if endpoint is None else replace(asked, driver=endpoint)
        if plan_only:
            _planned(asked, as_json)
            return
        found = _measured(asked, out)
    page, text = write_pages(run_pages(out), Path(out).expanduser())
    if as_json:
        print_json([row.to_dict() for row in found])
    else:
        _show(found)
        typer.echo(f"wrote {page} and {text}")
    if bad := [row for row in found if row.status != "ok"]:
        raise KeepKVError(f"{len(bad)} of {len(found)} choices gave nothing, e.g. {bad[0].choice}: {bad[0].error}")


def _measured(asked: object, out: str) -> list[ResultRow]:
    from functools import partial

    from keepkv.characterize.drive.run import characterize as run
    from keepkv.characterize.grid.plan import plan
    from keepkv.characterize.grid.possible import refusal
    from keepkv.characterize.grid.read import Grid

    assert isinstance(asked, Grid)
    made = plan(asked, partial(refusal, asked))
    for point, why in made.dropped[:5]:
        typer.echo(f"note: dropped {point.choice}, {point.workload.label}: {why}", err=True)
    if len(made.dropped) > 5:
        typer.echo(f"note: dropped {len(made.dropped) - 5} more; --plan shows them", err=True)
    with progress_rows(len(made.points), resume(out)) as step:
        return run(asked, out, step)


def _planned(asked: object, as_json: bool) -> None:
    from functools import partial

    from keepkv.characterize.grid.plan import plan
    from keepkv.characterize.grid.possible import refusal
    from keepkv.characterize.grid.read import Grid

    assert isinstance(asked, Grid)
    made = plan(asked, partial(refusal, asked))
    if as_json:
        points = [
            {"choice": one.choice, "place": one.place, "role": one.role, "block": one.block} for one in made.points
        ]
        dropped = [{"choice": one.choice, "place": one.place, "why": why} for one, why in made.dropped]
        print_json({"points": points, "dropped": dropped, "seconds": made.seconds(asked)})
        return
    shown = table("block", "role", "choice", "workload", left=4)
    for one in made.points:
        shown.add_row(str(one.block), one.role, one.choice, one.workload.label)
    console().print(shown, markup=False)
    for one, why in made.dropped:
        typer.echo(f"dropped {one.choice}, {one.workload.label}: {why}")
    typer.echo(f"{len(made.points)} points, about {made.seconds(asked) / 60:.0f} min")


def _added(files: list[str], method: str, out: str) -> list[ResultRow]:
    from keepkv.characterize.record import folder as folders
    from keepkv.characterize.record.imported import imported
    from keepkv.characterize.record.summary import summarise
    from keepkv.measure.alone import alone
    from keepkv.measure.files import folder

    rows = [row for file in files for row in imported(file, method)]
    where = folder(out)
    with alone(where):
        held = folders.done(where)
        for row in rows:
            if row.point not in held:
                folders.add(where, row, [])
        return summarise(where)


def _show(found: list[ResultRow]) -> None:
    from keepkv.characterize.record.names import metric
    from keepkv.report.characterization.words import number, shown

    made = table("choice", "workload", *SHOWN, left=2)
    for row in found:
        if row.status == "ok":
            cells = [number(row.value(name), metric(name).unit) for name in SHOWN]
            made.add_row(row.choice, shown([row.workload])[0], *cells)
    console().print(made, markup=False)
