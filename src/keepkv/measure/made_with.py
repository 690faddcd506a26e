"""What a measurement was made with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keepkv.measure import environment


@dataclass(frozen=True, kw_only=True)
class MadeWith:
    """Everything that a row says of the machine and software behind it; in a file, its fields stand in the row itself.

    model: a name; None in files that say it elsewhere. device: "cpu", or the GPU with its own name; in a row of
    ``keepkv bench`` as it was asked for. dtype: of the weights, "float32". versions: of the libraries that decide a
    result, by name. revision: the git commit of keepkv; None where it runs from no repository.
    """

    model: str | None = None
    device: str
    dtype: str
    versions: dict[str, str]
    revision: str | None = None

    @classmethod
    def of(cls, model: Any, name: str | None = None) -> MadeWith:
        """What a measurement of ``model`` in this process is made with. name: instead of the model's own."""
        return cls(
            model=name or model.config._name_or_path or type(model).__name__,
            device=environment.device_name(model),
            dtype=str(model.dtype).removeprefix("torch."),
            versions=environment.versions(),
            revision=environment.revision(),
        )
