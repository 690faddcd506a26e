"""Calibrations that a server was started with: read once, checked against the model that it serves. Knows no vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from keepkv.core.calibration import Calibration, loaded
from keepkv.engine.fingerprint import facts_of
from keepkv.errors import CalibrationError


def calibrations(files: str | Sequence[str] | None) -> Mapping[str, Calibration]:
    """What ``files`` hold, by kind. Raises ``CalibrationError`` where one is no calibration."""
    if files is None:
        return {}
    return _read((files,) if isinstance(files, str) else tuple(files))


@lru_cache
def _read(files: tuple[str, ...]) -> Mapping[str, Calibration]:
    return {one.kind: one for one in loaded(list(files))}


def written(files: Any) -> list[str] | None:
    """``files``, one or several, as an engine's configuration carries them: where they are, whoever reads them."""
    if files is None:
        return None
    some = [files] if isinstance(files, str | Path) else files
    if not isinstance(some, Sequence) or not all(isinstance(x, str | Path) for x in some):
        raise CalibrationError(f"calibration={files!r}: expected the file of a calibration, or a list of files")
    return [str(Path(x).absolute()) for x in some]


def check_model(given: Mapping[str, Calibration], config: Any, name: str, layers: Iterable[int], ranks: int) -> None:
    """Raise ``CalibrationError`` where one of ``given`` is of another model than the served one, or has nothing for
    some of its ``layers``.

    config: of the text model, as transformers has it. Shape and settings are compared; weights are not, since an engine
    lays them out in its own way, and a warning says so. ranks: over which heads are spread.
    """
    if given and ranks > 1:
        raise CalibrationError(
            f"calibrations ({', '.join(given)}) are of all heads of a layer, and with {ranks} ranks each has some of "
            "them: start with --tensor-parallel-size 1, or without calibrations"
        )
    for one in given.values():
        one.check(
            {**facts_of(config), "name": name, "adapters": [], "weights": None, "unread": "vLLM has its own layout"},
            layers,
        )
