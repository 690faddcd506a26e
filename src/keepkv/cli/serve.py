"""``keepkv serve``: an engine that serves a model over HTTP, with keepkv inside."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument, Option

from keepkv.cli.output import one_line_errors

ENGINES = {"vllm": "keepkv.integrations.vllm.flags"}  # by name: integrations stand above the command line


@one_line_errors
def serve(
    model: Annotated[str, Argument(help="Directory or Hub name, as the engine takes it.")],
    flags: Annotated[list[str] | None, Argument(help="Further flags of the engine, behind --.")] = None,
    engine: Annotated[str, Option(help="The engine that serves: vllm.")] = "vllm",
    method: Annotated[
        str | None,
        Option("--method", "-m", help="NAME or NAME:key=value of requests that name none; auto if absent."),
    ] = None,
    budget: Annotated[
        str | None,
        Option("--budget", "-b", help="Share of the tokens (0.25) or slots per head (512); on request only if absent."),
    ] = None,
    every: Annotated[int | None, Option(min=1, help="Compress again after so many tokens of the reply.")] = None,
    fill: Annotated[bool, Option("--fill", help="Keep up to a block more, so that stock kernels attend.")] = False,
    device: Annotated[str | None, Option(help="cpu or cuda; what the installed engine runs on if absent.")] = None,
    show: Annotated[bool, Option("--show", help="Print the engine's command, and do not run it.")] = False,
) -> None:
    """Serve a model with vLLM, whose requests may be compressed, each by its own budget.

    \b
    Examples:
      keepkv serve Qwen/Qwen3-8B --budget 0.25
      keepkv serve ./my-model -m snapkv:window=16 -b 1024 --every 256 -- --port 8001
      keepkv serve ./my-model --device cuda --show
    """
    import os
    import shlex
    from importlib import import_module
    from shutil import which
    from tempfile import mkdtemp

    from keepkv.cli.arguments import variant
    from keepkv.errors import KeepKVError, UnknownName

    if engine not in ENGINES:
        raise UnknownName("engine", engine, ENGINES)
    chosen = variant(method) if method is not None else None
    options = dict(chosen.options) if chosen else {}
    if (when := options.pop("when", None)) is not None:
        if when.cap is not None:
            raise KeepKVError(f"when.cap={when.cap}: a server keeps no hard cap. Give a budget in slots and --every")
        every = when.every if every is None else every
    options |= {"every": every} if every is not None else {}
    options |= {"fill": True} if fill else {}
    made = import_module(ENGINES[engine])
    command = [*made.serve_command(model, chosen.method if chosen else None, budget, device=device, **options)]
    command += flags or []
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
