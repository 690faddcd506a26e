"""``keepkv methods``: what there is, and what each method takes."""

from __future__ import annotations

from typing import Annotated

import typer

from keepkv.cli.options import AsJson, Import
from keepkv.cli.output import console, one_line_errors, print_json, table
from keepkv.methods.base import method_info
from keepkv.methods.base import methods as all_methods


@one_line_errors
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its documentation and options.")] = None,
    imports: Import = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, or describe one.

    \b
    Examples:
      keepkv methods
      keepkv methods snapkv
      keepkv methods --json
    """
    if name is None:
        found = all_methods()
        if as_json:
            print_json(found)
            return
        listing = table("method", "what it does", "paper", left=3)
        for info in found:
            listing.add_row(info.name, info.summary.replace("``", "`"), info.paper)
        console().print(listing)
        return
    info = method_info(name)
    if as_json:
        print_json(info)
        return
    out = console()
    out.print(f"[bold]{info.name}[/bold]" + (f"  {info.paper}" if info.paper else ""))
    typer.echo("\n" + info.doc.replace("``", "`") + "\n")  # not wrapped again: it has formulas
    if info.options:
        listing = table("option", "default", left=2)
        for key, default in info.options.items():
            listing.add_row(key, repr(default))
        out.print(listing)
