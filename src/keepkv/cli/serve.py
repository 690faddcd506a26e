"""``keepkv serve``: a model over HTTP, by keepkv's own server, or by an engine with keepkv inside."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

import typer
from typer import Argument, Option

from keepkv.cli.output import console, one_line_errors
from keepkv.errors import KeepKVError, UnknownName

ENGINES = {"vllm": "keepkv.integrations.vllm.flags"}  # by name: integrations stand above the command line
OWN = "keepkv"
OF_VLLM = frozenset({"model", "method", "budget", "every", "device"})  # fields that vLLM is told, too
SHORT = {"method": "-m", "budget": "-b"}
VARIABLES = {"api_key": "KEEPKV_API_KEY"}  # where others cannot read it in the list of processes


def flags_of_fields(verb: Callable[..., None]) -> Callable[..., None]:
    """``verb`` with a flag for each field of a server's configuration, beside its own."""
    try:
        from keepkv.serve.config import Config
    except ModuleNotFoundError as missing:
        raise KeepKVError(f"keepkv serve needs {missing.name}: pip install 'keepkv[serve]'") from None
    own = inspect.signature(verb, eval_str=True).parameters
    parameters = [one for one in own.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    for name, field in Config.model_fields.items():
        if name in own or name == "options":  # those of a method stand behind its name
            continue
        names = [f"--{name.replace('_', '-')}", *([SHORT[name]] if name in SHORT else [])]
        option = Option(*names, help=field.description, envvar=VARIABLES.get(name))
        hint: Any = Annotated[_kind(field) | None, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {one.name: one.annotation for one in parameters}
    return verb


def _kind(field: Any) -> Any:
    """What a flag is read as: a number where its field takes just that, and else text, which the field reads."""
    kinds = {*get_args(field.annotation), field.annotation} & {int, float}
    if any(get_origin(kind) is tuple for kind in get_args(field.annotation)):
        return list[str]
    read = any(hasattr(one, "func") for one in field.metadata)  # by a function of its own
    return kinds.pop() if len(kinds) == 1 and not read else str


@one_line_errors
@flags_of_fields
def serve(
    model: Annotated[str | None, Argument(help="Directory or Hub name; the embedded model if absent.")] = None,
    flags: Annotated[list[str] | None, Argument(help="Further flags of vLLM, behind --.")] = None,
    engine: Annotated[str, Option(help="Which server: keepkv, or vllm (docs/vllm.md).")] = OWN,
    config: Annotated[
        str | None, Option("--config", "-c", help="YAML file with flags; those given here count more.")
    ] = None,
    fill: Annotated[
        bool, Option("--fill", help="vllm: keep up to a block more, so that stock kernels attend.")
    ] = False,
    graphs: Annotated[bool, Option("--graphs", help="vllm: CUDA graphs of what lies between two attentions.")] = False,
    show: Annotated[bool, Option("--show", help="vllm: print the command, and do not run it.")] = False,
    **fields: Any,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients speak it; each request may be compressed, by a budget of its own.

    \b
    Examples:
      keepkv serve
      keepkv serve Qwen/Qwen3-0.6B --budget 0.25
      keepkv serve ./my-model --config serve.yaml --port 8001
      keepkv serve ./my-model --contexts ./contexts --memory 8GiB
      keepkv serve Qwen/Qwen3-8B --engine vllm -m snapkv -b 1024 -- --port 8001
    """
    given = {name: value for name, value in fields.items() if value is not None and value != []}
    if engine == OWN:
        if flags or fill or graphs or show:
            raise KeepKVError(
                "--fill, --graphs, --show and flags behind -- are vLLM's: add --engine vllm, or leave them out"
            )
        _own(config, {**given, "model": model})
    elif engine not in ENGINES:
        raise UnknownName("engine", engine, [OWN, *ENGINES])
    elif config is not None or given.keys() - OF_VLLM:
        first = "config" if config is not None else min(given.keys() - OF_VLLM)
        raise KeepKVError(f"--{first.replace('_', '-')} is of keepkv's own server; vLLM has its own flags, behind --")
    elif model is None:
        raise KeepKVError("--engine vllm needs a model: a directory or a Hub name")
    else:
        _run(engine, model, flags or [], fill=fill, graphs=graphs, show=show, **given)


def _own(path: str | None, given: dict[str, Any]) -> None:
    """Serve with keepkv's own server."""
    from pathlib import Path

    from keepkv.cli.arguments import variant
    from keepkv.cli.load import load
    from keepkv.embedded import CHAT_TEMPLATE
    from keepkv.serve.config import read_config

    if ":" in (given.get("method") or ""):
        chosen = variant(given["method"])
        given |= {"method": chosen.method, "options": dict(chosen.options)}
    config = read_config(path, given)
    settings = config.settings  # refused before a model is loaded
    try:
        from keepkv.serve.http.run import serve as run
    except ModuleNotFoundError as missing:
        raise KeepKVError(f"keepkv serve needs {missing.name}: pip install 'keepkv[serve]'") from None
    model, tokenizer = load(config.model, config.device, dtype=config.dtype)
    if config.chat_template is not None:
        try:
            tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise KeepKVError(f"cannot read {str(config.chat_template)!r}: {error.strerror}") from error
    elif config.model is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    if not config.loopback and config.api_key is None:
        typer.echo(f"note: anyone who reaches {config.host} may use this server: --api-key asks for a key", err=True)
    del settings
    run(model, tokenizer, config, lambda line: console().print(line, markup=False, soft_wrap=True))


def _run(engine: str, model: str, flags: list[str], *, fill: bool, graphs: bool, show: bool, **given: Any) -> None:
    """Run an engine with keepkv inside in place of this process."""
    import os
    import shlex
    from importlib import import_module
    from shutil import which
    from tempfile import mkdtemp

    from keepkv.cli.arguments import variant

    chosen = variant(given["method"]) if given.get("method") is not None else None
    every, options = given.get("every"), dict(chosen.options) if chosen else {}
    if (when := options.pop("when", None)) is not None:
        if when.cap is not None:
            raise KeepKVError(f"when.cap={when.cap}: a server keeps no hard cap. Give a budget in slots and --every")
        every = when.every if every is None else every
    options |= {"every": every} if every is not None else {}
    options |= {"fill": True} if fill else {}
    options |= {"graphs": True} if graphs else {}
    made = import_module(ENGINES[engine])
    command = [
        *made.serve_command(
            model, chosen.method if chosen else None, given.get("budget"), device=given.get("device"), **options
        )
    ]
    command += flags
    if show:
        typer.echo(shlex.join(command))
        return
    program = which(command[0])
    if program is None:
        raise KeepKVError(
            f"{engine} is not installed here. Install it (docs/vllm.md), or print its command with --show"
        )
    with_metrics = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": mkdtemp(prefix="keepkv-metrics-")}
    os.execve(program, command, os.environ if "PROMETHEUS_MULTIPROC_DIR" in os.environ else with_metrics)
