"""Calibrations: what was measured of a model once, on texts, and is used by every cache of that model.

A piece that needs one says so: ``needs_calibration = "query-statistics"`` names the kind. ``keepkv calibrate KIND``
makes it, ``keepkv.Cache(…, calibration=FILE)`` takes it, and the piece finds its tensors in ``LayerView.calibration``.
"""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, Union

import torch
from torch import Tensor

from keepkv.core import tensorfile, wholefile
from keepkv.core.options import shown
from keepkv.errors import CalibrationError

FORMAT = "keepkv-calibration-1"
MAX_LAYERS = 10_000
SHIPPED = Path(__file__).parents[1] / "embedded" / "calibrations"
NOT_COMPARED = ("name", "unread")  # facts of a fingerprint that tell of a model, and do not identify it
Facts: TypeAlias = Mapping[str, Any]
Given: TypeAlias = Union["Calibration", str, Path, Sequence[Union["Calibration", str, Path]], None]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Tensors by layer and name, the model they were measured on, and how.

    kind: what was measured; ``keepkv calibrate --help`` lists the kinds.
    tensors: tensors by name for each layer, counted as the model counts its layers. A kind decides names and shapes.
    fingerprint: facts of the model, plain data, as ``keepkv.engine.fingerprint.fingerprint`` returns them.
    made_with: how it was made, plain data: versions, tokens, digest of the tokens, command. It is never compared.
    """

    kind: str
    tensors: Mapping[int, Mapping[str, Tensor]]
    fingerprint: Facts
    made_with: Facts
    _placed: dict[tuple[int, torch.device], dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, whole or not at all. Raises ``CalibrationError`` where that fails."""
        try:
            tensorfile.write(Path(path), FORMAT, self._header, self._flat)
        except (OSError, ValueError) as error:
            raise CalibrationError(f"cannot write {str(path)!r}: {wholefile.reason(error)}") from error

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what ``save`` wrote, or one that the package ships, by its name (``shipped``). Raises
        ``CalibrationError`` for a truncated, altered or foreign file."""
        _, header, flat = tensorfile.read(_file(path), _SOURCE)
        tensors: dict[int, dict[str, Tensor]] = {}
        for name, x in flat.items():
            if not tensorfile.all_finite(x):
                raise CalibrationError(f"{path}: tensor {name!r} has numbers that are not finite")
            layer, rest = name.split(".", 1)
            tensors.setdefault(int(layer), {})[rest] = x
        return cls(tensors=dict(sorted(tensors.items())), **header)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything it holds: two calibrations with the same digest are the same."""
        return tensorfile.digest(self._header, self._flat)

    def check(self, fingerprint: Facts, layers: Iterable[int] = ()) -> None:
        """Raise ``CalibrationError`` unless it is of the model of ``fingerprint`` and has tensors for ``layers``.

        The message says what differs, and the command that makes the right one. Warns where weights could not be read.
        """
        names = (self.fingerprint.keys() | fingerprint.keys()) - {*NOT_COMPARED, "weights"}
        differing = {n for n in names if self.fingerprint.get(n) != fingerprint.get(n)}
        if None in (known := (self.fingerprint.get("weights"), fingerprint.get("weights"))):
            reason = fingerprint.get("unread") or self.fingerprint.get("unread")
            warnings.warn(f"weights were not compared with those that were calibrated: {reason}", stacklevel=2)
        elif known[0] != known[1]:
            differing.add("weights")
        remedy = f"Make one for this model: {command(self.kind, fingerprint)}"
        if differing:
            pairs = (f"{n} ({self.fingerprint.get(n)!r}, given {fingerprint.get(n)!r})" for n in sorted(differing))
            raise CalibrationError(
                f"the calibration {self.kind!r} was made for another model, {self.fingerprint.get('name')!r}: "
                f"{', '.join(pairs)}. {remedy}"
            )
        if missing := sorted(set(layers) - set(self.tensors)):
            raise CalibrationError(f"the calibration {self.kind!r} has nothing for layers {missing}. {remedy}")

    def layer(self, index: int, device: torch.device) -> dict[str, Tensor]:
        """The tensors of one layer on ``device``, by name; copied there once, and empty where it has none."""
        if (index, device) not in self._placed:
            held = self.tensors.get(index, {})
            self._placed[index, device] = {name: x.to(device) for name, x in held.items()}
        return self._placed[index, device]

    @property
    def _header(self) -> str:
        facts = {"kind": self.kind, "fingerprint": self.fingerprint, "made_with": self.made_with}
        return json.dumps(facts, sort_keys=True)

    @property
    def _flat(self) -> dict[str, Tensor]:
        return {f"{layer}.{name}": x for layer, held in self.tensors.items() for name, x in held.items()}


def shipped() -> list[str]:
    """Names of the calibrations in the package, which are of the embedded model: ``calibration="embedded-gates"``."""
    return sorted(path.stem for path in SHIPPED.glob("*.safetensors"))


def _file(path: str | Path) -> Path:
    """The file at ``path``; where there is none, the one in the package that has this name."""
    own = Path(path)
    return SHIPPED / f"{path}.safetensors" if not own.exists() and str(path) in shipped() else own


def command(kind: str, fingerprint: Facts) -> str:
    """The command line that makes a calibration of ``kind`` for the model of ``fingerprint``."""
    model = shlex.quote(fingerprint.get("name") or "MODEL")
    return f"keepkv calibrate {kind} --model {model} --text FILE --out {kind}.safetensors"


def check_calibration(
    pieces: Sequence[object], given: Given, fingerprint: Callable[[], Facts], layers: Collection[int]
) -> dict[str, Calibration]:
    """The calibrations of a cache by kind: what ``pieces`` need, and nothing else.

    pieces: score, allocation …; ``needs_calibration`` of each is a kind or None. given: calibrations or their files.
    fingerprint: returns that of the cache's model; called only where something is needed or given. layers: those that
    the cache compresses. Raises ``CalibrationError`` where a calibration is missing, not needed, of another model, or
    lacks what a piece reads of it (its ``check_calibration``, if it has one).
    """
    found = {one.kind: one for one in loaded(given)}
    needs = needed(*pieces)
    facts = fingerprint() if found or needs else {}
    for kind, piece in needs.items():
        if kind not in found:
            raise CalibrationError(
                f"{piece} needs a calibration {kind!r} of this model, keepkv.Cache(…, calibration=FILE); given: "
                f"{', '.join(map(repr, found)) or 'none'}. Make it once: {command(kind, facts)}"
            )
        found[kind].check(facts, layers)
    for one in pieces:
        asks, check = getattr(one, "needs_calibration", None), getattr(one, "check_calibration", None)
        if asks and check:
            check([found[asks].tensors[index] for index in layers])
    if unused := sorted(found.keys() - needs.keys()):
        raise CalibrationError(
            f"calibration {', '.join(map(repr, unused))} was given, and no part of the method uses it. Leave it "
            "out, or choose the option that needs it, such as statistics='stored' of 'expected-attention'."
        )
    return found


def loaded(given: Given) -> list[Calibration]:
    """What is ``given``, files read. Raises ``CalibrationError`` for anything else, and where a file is none."""
    one = (Calibration, str, Path)
    some = [given] if isinstance(given, one) else (given or [])
    if not isinstance(some, Sequence) or not all(isinstance(x, one) for x in some):
        raise CalibrationError(f"calibration={shown(given)}: expected a keepkv.Calibration, its file, or a list")
    return [x if isinstance(x, Calibration) else Calibration.load(x) for x in some]


def needed(*pieces: object) -> dict[str, str]:
    """The kinds of calibration that ``pieces`` need, and which piece needs each."""
    return {kind: type(piece).__name__ for piece in pieces if (kind := getattr(piece, "needs_calibration", None))}


def digests(calibrations: Mapping[str, Calibration]) -> dict[str, str]:
    """Digest of each calibration by kind: what a saved cache remembers of them."""
    return {kind: one.digest for kind, one in calibrations.items()}


def check_same(written: Mapping[str, str], given: Mapping[str, Calibration], path: Path) -> None:
    """Raise ``CalibrationError`` unless ``given`` are the calibrations that the cache saved at ``path`` was made with.

    written: ``digests`` as the file's header has them.
    """
    found = digests(given)
    for kind, digest in written.items():
        if found.get(kind) != digest:
            raise CalibrationError(
                f"{path}: compressed with the calibration {kind!r} of digest {digest[:12]}…, given: "
                f"{found.get(kind, 'none')[:12]}. Pass the same file: keepkv.Cache.load(path, model, calibration=FILE)."
            )


def of_layer(calibrations: Mapping[str, Calibration], index: int, device: torch.device) -> dict[str, Tensor] | None:
    """What a view of one layer holds: the tensors of all ``calibrations`` by name; None where there are none."""
    if not calibrations:
        return None
    return {name: x for one in calibrations.values() for name, x in one.layer(index, device).items()}


def _inspect(format: str, header: Any, declared: Mapping[str, tensorfile.Declared]) -> None:
    """Raise ``ValueError`` unless the fields of a file are those of a ``Calibration``."""
    kinds = {"kind": str, "fingerprint": dict, "made_with": dict}
    if not isinstance(header, dict) or header.keys() != kinds.keys():
        raise ValueError(f"its header does not have the fields {', '.join(kinds)}")
    if wrong := [name for name, kind in kinds.items() if not isinstance(header[name], kind)]:
        raise ValueError(f"{', '.join(wrong)} in its header is of another type")
    for name in declared:
        layer, _, rest = name.partition(".")
        if not (layer.isascii() and layer.isdigit() and rest and len(layer) < 6 and int(layer) < MAX_LAYERS):
            raise ValueError(f"tensor {name!r:.40} does not say of which layer it is")


_SOURCE = tensorfile.Source([FORMAT], "a calibration", CalibrationError, inspect=_inspect)
