"""``keepkv recommend``: what to take, of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from keepkv.cli.options import AsJson, Texts
from keepkv.cli.output import one_line_errors, print_json

Limits = Annotated[
    Texts, Option("--limit", "-l", help="ttft_p95<=0.5, worst_drop<=0.02, peak_bytes<=2e9 … Repeatable.")
]
Axes = Annotated[
    Texts, Option("--axis", "-a", help="Metrics to compare by: ratio, tpot_p50 and score if absent. Repeatable.")
]


@one_line_errors
def recommend(
    directory: Annotated[str, Argument(metavar="DIR", help="What keepkv characterize wrote.")],
    axis: Axes = None,
    limit: Limits = None,
    objective: Annotated[
        str | None, Option(help="A metric to take the best of; the knee of the front if absent.")
    ] = None,
    again: Annotated[
        bool, Option("--again", help="Measure what is taken once more, and say how far it moved.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what to take, of what was measured: limits first, then the front, then one choice and its neighbours' price.

    A choice is beaten only where the interval of the difference says so. Nothing in between of what was measured is
    ever recommended. The page is DIR/recommendation.html.

    \b
    Examples:
      keepkv recommend run
      keepkv recommend run --axis j_per_correct --axis ttft_p95 --limit 'worst_drop<=0.02'
      keepkv recommend run --limit 'ttft_p95<=0.5' --objective output_per_s --again
    """
    from keepkv.characterize.analyse.pareto import axes_of
    from keepkv.characterize.analyse.recommend import AXES, Limit, by_place
    from keepkv.characterize.analyse.recommend import recommend as find
    from keepkv.characterize.drive.again import again as measure_again
    from keepkv.characterize.record.folder import read
    from keepkv.characterize.record.summary import choices
    from keepkv.report.characterization import recommended, write_pages

    axes, limits = axes_of(axis or AXES), [Limit.read(text) for text in limit or ()]
    best = None if objective is None else axes_of([objective])[0]
    run = read(directory)
    found = [find(held, axes, limits, best) for held in by_place(choices(run)).values()]
    page, _ = write_pages(recommended(found), Path(directory).expanduser(), "recommendation")
    if as_json:
        print_json(found)
    else:
        for one in found:
            typer.echo(f"{', '.join(one.place)}: {f'take {one.pick.choice}, {one.why}' if one.pick else one.why}")
        typer.echo(f"wrote {page}")
    for one in found if again else ():
        if one.pick is not None:
            for change in measure_again(run, one.pick, one.axes):
                share = "" if change.share is None else f", {100 * change.share:+.1f} %"
                share += "" if change.beside is None else f"; beside the baseline {100 * change.beside:+.1f} %"
                typer.echo(
                    f"again {one.pick.choice}: {change.name} {change.before:.4g}, now {change.now:.4g}{share}",
                    err=as_json,
                )
    if any(one.pick is None for one in found):
        raise typer.Exit(1)
