"""``keepkv methods``: what there is, and what each method takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.text import Text
from typer import Option

from keepkv.cli.options import AsJson, Import
from keepkv.cli.output import console, one_line_errors, print_json, progress, table
from keepkv.errors import KeepKVError

if TYPE_CHECKING:
    from keepkv.methods.base import MethodInfo
    from keepkv.methods.presets import Preset

_PREFILL = "immediate: while a prompt is read; deferred: with the first decoded token; none: never"


@one_line_errors
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its documentation and options.")] = None,
    advise: Annotated[bool, Option("--advise", help="Say which to take for which work.")] = False,
    like: Annotated[
        str | None,
        Option("--like", help="Which methods keep the same tokens as this one, on the model in the package."),
    ] = None,
    imports: Import = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, or describe one.

    \b
    Examples:
      keepkv methods
      keepkv methods snapkv
      keepkv methods --advise
      keepkv methods --like snapkv
      keepkv methods --json
    """
    from keepkv.methods import method_info
    from keepkv.methods import methods as all_methods

    if advise:
        if name is not None:
            raise KeepKVError(f"methods {name} --advise: leave out the name, or --advise")
        _advise(as_json)
        return
    if like is not None:
        if name is not None:
            raise KeepKVError(f"methods {name} --like {like}: leave out the name, or --like")
        _like(like, as_json)
        return
    if name is None:
        found = all_methods()
        if as_json:
            print_json(found)
            return
        _list(found)
        return
    info = method_info(name)
    if as_json:
        print_json(info)
        return
    _describe(info)


def _list(found: list[MethodInfo]) -> None:
    """The methods by family: what each does, and what it needs beyond a forward over the text."""
    out, width = console(), max(len(info.name) for info in found)
    for group in sorted({info.group for info in found}, key=lambda title: (not title.startswith("Ours"), title)):
        out.print(f"\n[bold]{escape(group)}[/bold]")
        listing = table("", "", left=2)
        listing.show_header, listing.columns[0].width = False, width
        for info in found:
            if info.group == group:
                more = "; needs ".join([info.paper, "; ".join(info.needs)]).removeprefix("; ").removesuffix("; needs ")
                said = info.summary.replace("``", "`")
                listing.add_row(info.name, Text.assemble(said, (f"\n{more}" if more else "", "dim")))
        out.print(listing)
    out.print("\nkeepkv methods NAME says all of one; --advise, which to take; --like NAME, which keep the same")


def _like(name: str, as_json: bool) -> None:
    """Every other method, by how many of the tokens that ``name`` keeps it keeps too."""
    from keepkv.cli.load import load
    from keepkv.evaluation.alike import alike
    from keepkv.methods import METHODS, method_info
    from keepkv.tasks import demo_document

    method, budget = method_info(name).name, 0.25
    others = [one for one in METHODS if one not in (method, "full")]
    model, tokenizer = load(None)
    context = tokenizer(demo_document()[0]).input_ids
    with progress(1 + len(others)) as step:
        found = alike(model, context, method, others, budget, step)
    if as_json:
        print_json(found)
        return
    out = console()
    out.print(f"Of what {method} keeps at {budget:.0%} of {len(context)} tokens (the model in the package) is kept by")
    shown = table("method", "share")
    for one in found:
        if one.shared is not None:
            shown.add_row(one.method, f"{one.shared:.0%}")
    out.print(shown)
    for one in found:
        if one.shared is None:
            out.print(f"not run: {one.method}: {one.why}", markup=False)


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
    from keepkv.measure.rows import method_label

    return method_label(preset.method, dict(preset.options))


def _describe(info: MethodInfo) -> None:
    """One method: what it does, and a line for each option."""
    out = console()
    out.print(f"[bold]{info.name}[/bold]" + (f"  {info.paper}" if info.paper else ""))
    out.print(info.group, style="dim", markup=False)
    typer.echo("\n" + info.doc.replace("``", "`") + "\n")  # not wrapped again: it has formulas
    for label, said in (("needs", info.needs), ("does", info.does)):
        for line in said:
            out.print(f"{label:6}{line}", markup=False)
    out.print()
    if not info.options:
        return
    shown = table("option", "takes", "default", "what it is", left=4)
    for key, default in info.options.items():
        if key == "when":
            shown.add_row("when.prefill", "text or none", _value(default.prefill), _PREFILL)
            shown.add_row("when.every", "integer or none", _value(default.every), "also after so many decoded tokens")
            shown.add_row("when.cap", "integer or none", _value(default.cap), "slots per head that are never passed")
        else:
            shown.add_row(key, info.types.get(key, ""), _value(default), info.meanings.get(key, ""))
    out.print(shown)
    typer.echo(f"\nkeepkv generate -m {info.name}:option=value,option=value")


def _value(default: object) -> str:
    """A default as the command line takes it."""
    return str(default).lower() if default is None or isinstance(default, bool) else str(default)
