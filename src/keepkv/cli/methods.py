"""``keepkv methods``: what there is, and what each method takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from keepkv.cli.options import AsJson, Import
from keepkv.cli.output import console, one_line_errors, print_json, table
from keepkv.errors import KeepKVError

if TYPE_CHECKING:
    from keepkv.methods.base import MethodInfo
    from keepkv.methods.presets import Preset

_PREFILL = "immediate: while a prompt is read; deferred: with the first decoded token; none: never"


@one_line_errors
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its documentation and options.")] = None,
    advise: Annotated[bool, Option("--advise", help="Say which to take for which work.")] = False,
    imports: Import = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, or describe one.

    \b
    Examples:
      keepkv methods
      keepkv methods snapkv
      keepkv methods --advise
      keepkv methods --json
    """
    from keepkv.methods import method_info
    from keepkv.methods import methods as all_methods

    if advise:
        if name is not None:
            raise KeepKVError(f"methods {name} --advise: leave out the name, or --advise")
        _advise(as_json)
        return
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
    _describe(info)


def _advise(as_json: bool) -> None:
    """The presets: for which work, what they stand for, what was measured, what they need."""
    from keepkv.measure.rows import plain
    from keepkv.methods import PRESETS

    if as_json:
        print_json([{"name": name, "takes": _typed(one), **plain(one)} for name, one in PRESETS.items()])
        return
    out = console()
    for name, preset in PRESETS.items():
        out.print(f"[bold]{name}[/bold]: {preset.work}")
        out.print(f"  takes   {_typed(preset)}", markup=False)
        out.print(f"  because {preset.why}", markup=False)
        out.print(f"  needs   {preset.needs}", markup=False)
        out.print()
    out.print(f"In Python: keepkv.Cache(model, {next(iter(PRESETS))!r}, budget=0.25); options beside it count more.")
    out.print("Measure on your own text: keepkv fidelity --model NAME --text FILE -m METHOD -b 0.25")


def _typed(preset: Preset) -> str:
    """What a preset stands for, as the command line takes it."""
    from keepkv.core.when import When
    from keepkv.measure.rows import method_label

    parts: dict[str, Any] = {}
    for key, value in preset.options.items():
        if isinstance(value, When):
            parts |= {f"when.{part}": x for part, x in vars(value).items() if x != getattr(When(), part)}
        else:
            parts[key] = value
    return method_label(preset.method, parts)


def _describe(info: MethodInfo) -> None:
    """One method: what it does, and a line for each option."""
    out = console()
    out.print(f"[bold]{info.name}[/bold]" + (f"  {info.paper}" if info.paper else ""))
    typer.echo("\n" + info.doc.replace("``", "`") + "\n")  # not wrapped again: it has formulas
    if not info.options:
        return
    shown = table("option", "takes", "default", "what it is", left=4)
    for key, default in info.options.items():
        if key == "when":
            shown.add_row("when.prefill", "text or none", _value(default.prefill), _PREFILL)
            shown.add_row("when.every", "integer or none", _value(default.every), "also after so many decoded tokens")
        else:
            shown.add_row(key, info.types.get(key, ""), _value(default), info.meanings.get(key, ""))
    out.print(shown)
    typer.echo(f"\nkeepkv generate -m {info.name}:option=value,option=value")


def _value(default: object) -> str:
    """A default as the command line takes it."""
    return str(default).lower() if default is None or isinstance(default, bool) else str(default)
