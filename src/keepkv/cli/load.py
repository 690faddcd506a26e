"""Loads a model and its tokenizer for the command line, quietly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from keepkv.errors import KeepKVError


def load(model: str | None, device: str = "auto") -> tuple[Any, Any]:
    """Model in evaluation mode and tokenizer, from a directory or a Hub name; the embedded ones for ``None``.

    ``device`` is what torch calls it; ``"auto"`` is the first GPU where there is one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from keepkv.embedded import embedded_model

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = embedded_model() if model is None else model
    if name.startswith((".", "/", "~")):
        name = str(Path(name).expanduser())
        if not Path(name).is_dir():
            raise KeepKVError(f"no model directory {name!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise KeepKVError(f"cannot load model {name!r}: {reason}") from error
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        return loaded.to(where).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise KeepKVError(f"device {where!r}: {str(error).partition(chr(10))[0]}") from error
