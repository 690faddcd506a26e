"""Loads a model and its tokenizer for the command line, quietly."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from keepkv.cli import small_model
from keepkv.cli.progress import waiting
from keepkv.errors import KeepKVError, UnknownName


def one_line(error: Exception) -> str:
    """The whole message of an error of transformers, on one line."""
    return " ".join(str(error).split())


DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(
    model: str | None, device: str = "auto", *, dtype: str = "auto", device_map: str | None = None
) -> tuple[Any, Any]:
    """Model in evaluation mode and tokenizer, from a directory, a GGUF file or the Hub; the embedded ones for ``None``.

    device: what torch calls it; ``"auto"`` is the first GPU where there is one. dtype: of the weights; ``"auto"`` as
    they were saved. device_map: what transformers takes; ``device`` is then left out of account.
    """
    if dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)
    if device_map is not None and find_spec("accelerate") is None:
        raise KeepKVError("--device-map needs accelerate, which is not installed: pip install accelerate")
    with waiting("importing transformers"):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from keepkv.embedded import embedded_model
    file = None if model is None else small_model.file_of(model)
    name = _name(embedded_model() if model is None else model) if file is None else str(file.parent)
    read = {} if file is None else {"gguf_file": file.name}
    _quiet()
    mapped = {} if device_map is None else {"device_map": device_map}
    local = Path(name).is_dir()
    if not local and sys.stderr.isatty():
        print(f"loading {name}", file=sys.stderr)
    shown = waiting(f"loading {name}") if local else nullcontext()  # else transformers shows how far a download is
    try:
        with shown, _no_bar_of_gguf() if read else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(name, **read)
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **mapped, **read)
    except (OSError, ValueError) as error:
        raise KeepKVError(f"cannot load model {name!r}: {one_line(error)}") from error
    return (loaded.eval() if device_map is not None else placed(loaded, device)), tokenizer


def load_vlm(model: str, device: str = "auto") -> tuple[Any, Any]:
    """A model that sees, in evaluation mode, and its processor, from a directory or the Hub."""
    name = _name(model)
    _quiet()
    with waiting(f"loading {name}"):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(name)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
        except (OSError, ValueError, ImportError) as error:
            raise KeepKVError(f"cannot load model {name!r} with its processor: {one_line(error)}") from error
    return placed(loaded, device), processor


def load_embedded_vlm(device: str = "auto") -> tuple[Any, Any]:
    """The one that sees in the package, and its processor."""
    with waiting("importing transformers"):
        from keepkv.embedded import embedded_vlm

        _quiet()
        model, processor = embedded_vlm()
    return placed(model, device), processor


def load_seeing(model: str | None, device: str = "auto", size: tuple[int, int] | None = None) -> tuple[Any, Any]:
    """A model that sees, the one in the package for ``None``, and its tokenizer, which reads pictures too: a
    ``keepkv.vision.seeing.Seeing``. size: that pictures are brought to."""
    found, processor = load_embedded_vlm(device) if model is None else load_vlm(model, device)
    from keepkv.vision.seeing import Seeing

    return found, Seeing(found, getattr(processor, "tokenizer", processor), size, processor)


def placed(model: Any, device: str) -> Any:
    """``model`` in evaluation mode on ``device``; ``"auto"`` is the first GPU where there is one."""
    import torch

    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        return model.to(where).eval()
    except (RuntimeError, AssertionError) as error:
        raise KeepKVError(f"device {where!r}: {str(error).partition(chr(10))[0]}") from error


def _name(model: str) -> str:
    if not model.startswith((".", "/", "~")):
        return model
    path = Path(model).expanduser()
    if not path.is_dir():
        raise KeepKVError(f"no model directory {str(path)!r}")
    return str(path)


def _quiet() -> None:
    """Of what transformers and the Hub say by themselves, only how far downloads are; reasons come with errors."""
    from huggingface_hub.utils import logging as hub
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    hub.set_verbosity_error()  # one line for each time that it tries again
    logging.disable_progress_bar()
    enable_progress_bars()


@contextmanager
def _no_bar_of_gguf() -> Iterator[None]:
    """Inside, the reader of GGUF files shows no bar of its own, which nothing in transformers turns off."""
    reader: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    before = reader.tqdm
    reader.tqdm = lambda tensors, **said: tensors
    try:
        yield
    finally:
        reader.tqdm = before
