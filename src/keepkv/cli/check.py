"""``keepkv check``: the versions that run here, or what keepkv does with a model."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from keepkv.cli.options import AsJson
from keepkv.cli.output import console, one_line_errors, print_json, table
from keepkv.engine.examine import check as check_model
from keepkv.engine.versions import NEWEST, OLDEST, untested
from keepkv.errors import KeepKVError
from keepkv.measure.environment import versions


@one_line_errors
def check(
    model: Annotated[
        str | None, typer.Argument(help="Model directory, Hub name or config.json; no weights are read.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say which layers of a model are compressed, or why it is refused (exit code 1); alone: the versions here.

    \b
    Examples:
      keepkv check
      keepkv check Qwen/Qwen3-0.6B
      keepkv check path/to/config.json --json
    """
    if model is None:
        _versions(as_json)
        return
    found = check_model(_config(model))
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found.rows())
    if found.refused is not None:
        raise typer.Exit(1)


def _versions(as_json: bool) -> None:
    here = versions() | {"triton": _triton()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    tested = {name: [str(OLDEST[name]), str(NEWEST[name])] for name in NEWEST}
    if as_json:
        print_json({"versions": here, "tested": tested, "device": device, "note": untested()})
        return
    rows = [
        (name, here[name] + (f"  (tested: {' to '.join(tested[name])})" if name in tested else "")) for name in here
    ]
    note = untested()
    _print([*rows, ("device", device), *([] if note is None else [("note", note)])])


def _triton() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not installed: plain torch instead of kernels"


def _config(model: str) -> PreTrainedConfig:
    """The configuration of a directory, a Hub name or a file."""
    logging.set_verbosity_error()
    path = Path(model).expanduser()
    if model.startswith((".", "/", "~")) and not path.exists():
        raise KeepKVError(f"no model directory or configuration {model!r}")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(path) if path.exists() else model)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise KeepKVError(f"cannot read the configuration of {model!r}: {reason}") from error
    return config


def _print(rows: list[tuple[str, Any]]) -> None:
    listing = table("", "", left=2)
    listing.show_header = False
    for label, value in rows:
        listing.add_row(label, value)
    console().print(listing, markup=False)
