"""What every kind of calibration has in common: a name, a model, texts, and a record of them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from keepkv.core.calibration import Calibration
from keepkv.core.registry import Registry
from keepkv.engine.fingerprint import fingerprint
from keepkv.errors import CalibrationError
from keepkv.measure.environment import device_name, versions

Tensors: TypeAlias = dict[int, dict[str, Tensor]]  # by layer of the model, then by name


class Found(NamedTuple):
    """What a kind found. tensors: what pieces read. facts: plain data for the record, such as how well it does. says:
    lines of the same for a reader."""

    tensors: Tensors
    facts: dict[str, Any]
    says: list[str]


F = TypeVar("F", bound=Callable[..., Tensors | Found])

KINDS: Registry[Tensors | Found] = Registry("kind of calibration")


def register_kind(name: str) -> Callable[[F], F]:
    """Register a function ``(model, batches, **options) -> tensors by layer``, or ``Found``, as the kind ``name``.

    batches: token ids (B,T) int64 on the model's device, without padding, each a text or a piece of one. They can be
    iterated once; a kind that needs them again makes a list. A kind with an option ``asked`` is given the questions on
    each text, see ``questions.with_questions``; one with an option ``needles`` the needle in each, see
    ``needles.with_needles``. A piece reads the tensors from ``LayerView.calibration``,
    where those of other kinds may lie too: names begin with a word of the kind.
    """
    return KINDS.register(name)


def asks(kind: str) -> bool:
    """Whether the kind watches a model answer questions: its option ``asked`` has those of each text."""
    return "asked" in inspect.signature(KINDS.factory(kind)).parameters


def hides(kind: str) -> bool:
    """Whether the kind watches a model look for needles: its option ``needles`` has that of each text."""
    return "needles" in inspect.signature(KINDS.factory(kind)).parameters


def _told(options: dict[str, Any]) -> dict[str, Any]:
    """``options`` for the record; of questions and needles, how many there are."""
    asked, needles = options.get("asked"), options.get("needles")
    told = options if asked is None else options | {"asked": sum(map(len, asked))}
    return told if needles is None else told | {"needles": len(needles)}


def calibrate(
    kind: str, model: PreTrainedModel, batches: Iterable[Tensor], command: str = "", **options: Any
) -> Calibration:
    """Measure ``kind`` on ``model`` while it reads ``batches``, token ids (B,T) without padding.

    command: the line that was typed, for the record. options: those of the kind; ``KeepKVError`` names them where these
    do not fit. Raises ``UnknownName`` for a kind that is not registered, and
    ``CalibrationError`` where the model has no layer that can be compressed.
    """
    kind = KINDS.named(kind)
    sha, tokens = hashlib.sha256(), 0

    def recorded() -> Iterator[Tensor]:
        nonlocal tokens
        for ids in batches:
            tokens += ids.numel()
            sha.update(f"{tuple(ids.shape)}".encode() + ids.cpu().long().numpy().tobytes())
            yield ids.to(model.device)

    made = KINDS.build(kind, model, recorded(), **options)
    tensors, facts, says = made if isinstance(made, Found) else Found(made, {}, [])
    if not any(tensors.values()):
        raise CalibrationError(f"{type(model).__name__} has no layer that a cache compresses: nothing to calibrate")
    made_with = (
        {
            "command": command,
            "tokens": tokens,
            "texts": sha.hexdigest(),
            "versions": versions(),
            "device": device_name(model),
            "dtype": str(model.dtype),
        }
        | ({"options": told} if (told := _told(options)) else {})
        | ({"found": facts, "says": says} if says else {})
    )
    return Calibration(kind, tensors, fingerprint(model), made_with)
