"""The configuration of a model, wherever it is: a folder, a file, the Hub, or already in hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from keepkv.errors import KeepKVError


def read_config(model: Any) -> PreTrainedConfig:
    """Of a configuration, a model, a folder with config.json, that file, or a name on the Hub, whose config.json is
    taken from the cache of earlier downloads, or fetched. No weights are read."""
    if isinstance(model, PreTrainedConfig):
        return model
    if not isinstance(model, (str, Path)):
        config = getattr(model, "config", None)
        if isinstance(config, PreTrainedConfig):
            return config
        raise KeepKVError(
            f"model={type(model).__name__} is no model. Give a folder with config.json, a name on the Hub, a "
            "configuration of transformers, or a model."
        )
    path = Path(model).expanduser()
    if str(model).startswith((".", "/", "~")) and not path.exists():
        raise KeepKVError(
            f"no folder or file {str(model)!r}. Give a folder with config.json in it, or a name on the Hub."
        )
    if path.exists():
        return _read(str(path), str(model), "Is it the folder of a model, with a config.json of transformers in it?")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        found: PreTrainedConfig = AutoConfig.from_pretrained(str(model), local_files_only=True)
        return found
    except (OSError, ValueError, KeyError):
        return _read(
            str(model), str(model), "Check the name, go online, or give a folder with the model's config.json in it."
        )
    finally:
        logging.set_verbosity(before)


def _read(where: str, name: str, remedy: str) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(where)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise KeepKVError(f"cannot read the configuration of {name!r}: {reason} {remedy}") from error
    return config
