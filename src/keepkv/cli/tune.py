"""``keepkv tune``: three studies of what to run: a search, a capacity plan, a schedule."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from keepkv.cli.options import AsJson, Texts
from keepkv.cli.output import one_line_errors, print_json, resume, waiting
from keepkv.cli.recommend import Axes, Limits
from keepkv.errors import KeepKVError

if TYPE_CHECKING:
    from keepkv.characterize.grid.read import Grid

Directory = Annotated[str, Argument(metavar="DIR", help="What keepkv characterize wrote.")]


@one_line_errors
def search(
    grid: Annotated[str, Argument(metavar="GRID.yaml", help="Its first application, workload and hardware are used.")],
    out: Annotated[str, Option(help="Directory of what is measured; the same command goes on with it.")] = "tuning",
    minutes: Annotated[float, Option(min=0.01, help="Time for all of it.")] = 30.0,
    trials: Annotated[int, Option(min=1, help="Short measurements, at most.")] = 1000,
    keep: Annotated[int, Option(min=1, help="Of the best of them, how many are measured in full.")] = 4,
    least: Annotated[float, Option(help="Smallest budget, a share of the tokens.")] = 0.1,
    most: Annotated[float, Option(help="Largest budget.")] = 0.9,
    codec: Annotated[Texts, Option(help="Codec to choose from, or none. Repeatable.")] = None,
    axis: Axes = None,
    limit: Limits = None,
    seed: Annotated[int, Option(help="Of the search.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Search methods, budgets, codecs and weights for the best of several metrics at once, within a time.

    Short measurements show where to look (optuna); the best are measured in full, beside the full cache, and one of
    these is recommended. The page is OUT/search.html. Needs pip install 'keepkv[tune]'.

    \b
    Examples:
      keepkv tune search grid.yaml --minutes 60 --out tuning
      keepkv tune search grid.yaml --codec none --codec int4 --axis ratio --axis score
    """
    from keepkv.characterize.analyse.pareto import axes_of
    from keepkv.characterize.analyse.recommend import AXES, Limit
    from keepkv.characterize.analyse.search import Space
    from keepkv.characterize.analyse.search import search as find
    from keepkv.characterize.grid.read import read_grid
    from keepkv.report.characterization import search_pages, write_pages

    asked: Grid = read_grid(grid)
    methods = tuple(one for one in asked.techniques if one.method != "full")
    alike = {(one.method, str(one.options)): one for one in methods}
    space = Space(tuple(alike.values()), least, most, tuple(codec or ("none",)), asked.weights)
    axes, limits = axes_of(axis or AXES), [Limit.read(text) for text in limit or ()]
    with waiting("searching", resume(out)):
        found = find(asked, space, out, axes, limits, seconds=60 * minutes, trials=trials, keep=keep, seed=seed)
    page, _ = write_pages(search_pages(found), Path(out).expanduser(), "search")
    if as_json:
        print_json(found)
    else:
        typer.echo(f"{found.tried} tried, {len(found.survivors)} measured in full: {', '.join(found.survivors)}")
        pick = found.best.pick
        typer.echo(f"take {pick.choice}, {found.best.why}" if pick else found.best.why)
        typer.echo(f"wrote {page}")
    if found.best.pick is None:
        raise typer.Exit(1)


@one_line_errors
def capacity(
    directory: Directory,
    rate: Annotated[float, Option(help="Requests a second that are to be served.")],
    memory: Annotated[str, Option(help="Of one machine or GPU, such as 24GiB.")],
    weights: Annotated[str, Option(help="What the model itself takes of it, such as 5GiB.")],
    tokens: Annotated[float | None, Option(help="Of a request, prompt and reply; as measured if absent.")] = None,
    spare: Annotated[float, Option(help="Share of the memory that is kept free.")] = 0.1,
    as_json: AsJson = False,
) -> None:
    """Plan machines for a load, and say how many of them compression saves: from closed loops of several sizes.

    The bytes of a token say how many requests fit at once, the measured goodput with no more than that how many are
    served. The page is DIR/capacity.html.

    \b
    Examples:
      keepkv tune capacity run --rate 20 --memory 24GiB --weights 5GiB
    """
    from keepkv.characterize.analyse.capacity import Load
    from keepkv.characterize.analyse.capacity import capacity as find
    from keepkv.characterize.record.folder import read
    from keepkv.characterize.record.summary import choices
    from keepkv.plan.units import read_bytes
    from keepkv.report.characterization import capacity_pages, write_pages

    run = read(directory)
    sums = [(row.n_in or 0) + (row.n_out or 0) for rows in run.requests.values() for row in rows if row.status == "ok"]
    mean = sum(sums) / len(sums) if sums else 0.0
    load = Load(rate, tokens or mean, read_bytes(memory, "--memory"), read_bytes(weights, "--weights"), spare)
    plans = find([one.row for one in choices(run)], load)
    page, _ = write_pages(capacity_pages(plans, load), run.folder, "capacity")
    if as_json:
        print_json(plans)
    else:
        for one in plans:
            machines = "nothing measured fits" if one.machines is None else f"{one.machines} machines"
            saved = "" if not one.saves else f", {one.saves} less than without"
            typer.echo(f"{one.choice}: {machines}{saved}; {one.fits} fit at once; bound by {one.bound}")
        typer.echo(f"wrote {page}")


@one_line_errors
def schedule(
    directory: Directory,
    trace: Annotated[str, Option(help="Recorded arrivals: docs/characterize.md.")],
    power: Annotated[
        str | None, Option(help="CSV with choice, rate, j_per_output_token: joules from elsewhere.")
    ] = None,
    every: Annotated[float, Option(help="Seconds after which another setting may be taken.")] = 60.0,
    hysteresis: Annotated[float, Option(help="Share of energy that a change must save.")] = 0.05,
    tokens: Annotated[float, Option(help="Of a reply, where the trace does not say.")] = 128.0,
    limit: Limits = None,
    as_json: AsJson = False,
) -> None:
    """Choose the setting of least energy at each load, and replay it on a trace beside the best fixed setting.

    Open loops at several rates say what a token takes; where no sensor was there, --power brings joules that were
    measured elsewhere. The page is DIR/schedule.html.

    \b
    Examples:
      keepkv tune schedule run --trace day.jsonl --limit 'ttft_p95<=2'
      keepkv tune schedule run --trace day.jsonl --power measured.csv --every 300
    """
    from keepkv.characterize.analyse.recommend import Limit
    from keepkv.characterize.analyse.schedule import against_fixed, read_power, settings
    from keepkv.characterize.record.folder import read
    from keepkv.characterize.record.summary import choices
    from keepkv.characterize.workload.trace import read_trace
    from keepkv.report.characterization import schedule_pages, write_pages

    if every <= 0:
        raise KeepKVError(f"--every {every:g}: seconds above 0")
    limits = [Limit.read(text) for text in limit or ()]
    rows = [one.row for one in choices(read(directory))]
    found = settings(rows, limits, None if power is None else read_power(power))
    replays = against_fixed(found, read_trace(trace), every=every, tokens=tokens, hysteresis=hysteresis)
    page, _ = write_pages(schedule_pages(found, replays, every), Path(directory).expanduser(), "schedule")
    if as_json:
        print_json(replays)
    else:
        for one in replays:
            typer.echo(f"{one.name}: {one.joules:.4g} J, {one.switches} changes, {one.unmet} intervals unmet")
        typer.echo(f"wrote {page}")
