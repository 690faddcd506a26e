"""The verbs of the command line, put together. A verb is imported when it runs, not when it is listed."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from keepkv.cli.info import versions_line
from keepkv.cli.output import one_line_errors
from keepkv.cli.progress import VARIABLE, How, chosen, waiting
from keepkv.cli.wording import escaped, flowed, value_word, without_types

USE, COMPARE, INSIDE = "Use it", "Compare methods", "Look inside"


@dataclass(frozen=True)
class Verb:
    """A verb as it is listed.

    where: module in this folder, and its function, or its functions where the verb has verbs of its own. panel: heading
    it stands under. long: whether it works long enough to take ``--progress``.
    """

    name: str
    where: str
    panel: str
    long: bool = True

    @property
    def parts(self) -> list[str]:
        """Its own verbs; none where it is one function."""
        names = self.where.partition(":")[2].split(",")
        return names if len(names) > 1 else []

    @property
    def line(self) -> str:
        """The first paragraph of its help, read from the source: to import a verb takes seconds."""
        module, _, name = self.where.partition(":")
        source = Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        tree = ast.parse(source)
        found = (x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == name)
        said = ast.get_docstring(next(found, tree)) or ""
        first = flowed(said.partition("\n\n")[0].removeprefix(f"``keepkv {self.name}``: "))
        return first[:1].upper() + first[1:]

    def load(self) -> Any:
        """The command itself, with all that it needs."""
        module, _, name = self.where.partition(":")
        with waiting(f"starting keepkv {self.name}"):
            loaded = import_module(f"keepkv.cli.{module}")
        if not self.parts:
            return self._command(self.name, getattr(loaded, name))
        parts = {part: self._command(part, getattr(loaded, part)) for part in self.parts}
        return TyperGroup(name=self.name, commands=parts, help=self.line, no_args_is_help=True)

    def _command(self, name: str, function: Any) -> Any:
        one = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        run = with_progress(function) if self.long else function
        one.command(name, cls=_Verb, help=flowed(inspect.getdoc(function) or ""))(run)
        command: Any = get_command(one)
        hints = get_type_hints(run)
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.metavar is None:
                parameter.metavar = value_word(hints.get(parameter.name))
            if getattr(parameter, "help", None):
                parameter.help = escaped(parameter.help)
        return command


def with_progress(verb: Callable[..., Any]) -> Callable[..., Any]:
    """``verb`` with an option that says how its progress is shown."""

    @functools.wraps(verb)
    def run(*args: Any, progress: How, **kwargs: Any) -> Any:
        before = chosen.set(progress)
        try:
            return verb(*args, **kwargs)
        finally:
            chosen.reset(before)

    hint = Annotated[
        How, typer.Option(envvar=VARIABLE, help="A bar where a person watches and else plain lines; or say which.")
    ]
    own = inspect.signature(verb, eval_str=True)
    one = inspect.Parameter("progress", inspect.Parameter.KEYWORD_ONLY, default=How.auto, annotation=hint)
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), one])  # type: ignore[attr-defined]
    run.__annotations__ = {**get_type_hints(verb, include_extras=True), "progress": hint}
    return run


VERBS = (
    Verb("demo", "demo.command:demo", USE),
    Verb("watch", "watch.command:watch", USE),
    Verb("generate", "generate:generate", USE),
    Verb("fit", "fit:fit", USE, long=False),
    Verb("serve", "serve:serve", USE, long=False),
    Verb("methods", "methods:methods", USE, long=False),
    Verb("check", "check:check", USE, long=False),
    Verb("eval", "eval:evaluation", COMPARE),
    Verb("tasks", "tasks:tasks", COMPARE, long=False),
    Verb("fidelity", "fidelity:fidelity", COMPARE),
    Verb("report", "report:report", COMPARE),
    Verb("bench", "bench:bench", COMPARE),
    Verb("characterize", "characterize:characterize", COMPARE),
    Verb("recommend", "recommend:recommend", COMPARE, long=False),
    Verb("tune", "tune:search,capacity,schedule", COMPARE),
    Verb("layers", "layers:layers", INSIDE),
    Verb("calibrate", "calibrate:calibrate", INSIDE),
    Verb("train", "train:train", INSIDE),
    Verb("info", "info:info", INSIDE, long=False),
)


class _Verbs(TyperGroup):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, next((one_line_errors(verb.load)() for verb in VERBS if verb.name == name), command), rest

    def get_params(self, ctx: Any) -> list[Any]:
        return without_types(super().get_params(ctx))


class _Verb(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return without_types(super().get_params(ctx))


program = typer.Typer(
    name="keepkv",
    cls=_Verbs,
    help="KV-cache compression for transformers that really frees memory, and says what it did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(versions_line())
        raise typer.Exit


@program.callback()
def start(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            is_eager=True,
            callback=_print_version,
            metavar="",
            help="Print the version, and those of torch and transformers.",
        ),
    ] = False,
) -> None:
    """What stands before a verb."""


def _listed() -> None:
    """Stands for a verb that is not imported yet."""


for verb in VERBS:
    program.command(verb.name, help=verb.line, rich_help_panel=verb.panel)(_listed)
