"""``keepkv check``: what keepkv does with a model, told from its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from keepkv.cli.info import info
from keepkv.cli.load import one_line
from keepkv.cli.options import AsJson
from keepkv.cli.output import listing, one_line_errors, print_json
from keepkv.errors import KeepKVError


@one_line_errors
def check(
    model: Annotated[
        str | None, typer.Argument(help="Model directory, Hub name or config.json; no weights are read.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say which layers of a model are compressed, or why it is refused.

    Exit code 1 if the model is refused. Without a model: what `keepkv info` prints.

    \b
    Examples:
      keepkv check
      keepkv check Qwen/Qwen3-0.6B
      keepkv check path/to/config.json --json
    """
    if model is None:
        info(as_json)
        return
    from keepkv.engine.examine import check as check_model

    found = check_model(_config(model))
    if as_json:
        print_json(found.to_dict())
    else:
        listing(found.rows())
    if found.refused is not None:
        raise typer.Exit(1)


def _config(model: str) -> Any:
    """The configuration of a directory, a Hub name or a file."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    path = Path(model).expanduser()
    if model.startswith((".", "/", "~")) and not path.exists():
        raise KeepKVError(f"no model directory or configuration {model!r}")
    try:
        return AutoConfig.from_pretrained(str(path) if path.exists() else model)
    except (OSError, ValueError, KeyError) as error:
        raise KeepKVError(f"cannot read the configuration of {model!r}: {one_line(error)}") from error
