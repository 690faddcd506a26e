"""What a measurement was made with: the versions of libraries, the device, the revision of keepkv."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

from keepkv.core.plugins import imported
from keepkv.measure.rows import IF_KNOWN

PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class MadeWith:
    """Everything that a row says of the machine and software behind it; in a file, its fields stand in the row itself.

    model: a name; None in files that say it elsewhere. device: "cpu", or the GPU with its own name; in a row of
    ``keepkv bench`` as it was asked for. dtype: of the weights, "float32". versions: of the libraries that decide a
    result, by name. revision: the git commit of keepkv; None where it runs from no repository. imports: the digest of
    each file that was imported (``--import``), by its name; None where none was.
    """

    model: str | None = None
    device: str
    dtype: str
    versions: dict[str, str]
    revision: str | None = None
    imports: dict[str, str] | None = field(default=None, metadata=IF_KNOWN)

    @classmethod
    def of(cls, model: Any, name: str | None = None) -> MadeWith:
        """What a measurement of ``model`` in this process is made with. name: instead of the model's own."""
        return cls(
            model=name or model.config._name_or_path or type(model).__name__,
            device=device_name(model),
            dtype=str(model.dtype).removeprefix("torch."),
            versions=versions(),
            revision=revision(),
            imports=imports(),
        )

    @property
    def files_and_versions(self) -> dict[str, str]:
        """``versions`` and ``imports`` by name: what has a column of its own in a table."""
        return self.versions | (self.imports or {})


def imports() -> dict[str, str] | None:
    """The digest of each file that was imported in this process, by its name; None where none was."""
    return {one.path.name: one.digest for one in imported()} or None


def versions() -> dict[str, str]:
    """The versions of the libraries that decide a result, by name."""
    try:
        own = metadata.version("keepkv")
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {"torch": torch.__version__, "transformers": transformers.__version__, "keepkv": own}


def device_name(model: Any) -> str:
    """``cpu``, or the GPU with its own name: ``cuda:0 (NVIDIA H200)``."""
    device: torch.device = model.device
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def revision() -> str | None:
    """The git commit that keepkv runs from, ``-dirty`` after it where its source has changed since; None where it
    runs from no repository of its own."""
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git("rev-parse", "HEAD")
    return commit and commit + ("-dirty" if _git("status", "--porcelain", "--", ".") else "")


def _git(*words: str) -> str | None:
    # Without optional locks, a measurement never stands in the way of a commit made meanwhile.
    quiet = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(["git", *words], cwd=PACKAGE, env=quiet, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return done.stdout.strip() if done.returncode == 0 else None
