"""What a training is told, as a YAML file: dataclasses whose fields are checked, and an example made of them.

A text in an annotation is what the key means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from keepkv.core.calibration import loaded
from keepkv.core.options import Amount, Checked, Count, Positive, Seed, Share, Size, hints_of, one_of, shown
from keepkv.core.when import When
from keepkv.engine.cache import Cache
from keepkv.engine.fingerprint import fingerprint
from keepkv.engine.model import inner_model
from keepkv.errors import KeepKVError, UnknownName
from keepkv.measure.files import text_of
from keepkv.training.recorder import check_replayable

T = TypeVar("T", bound=Checked)


@dataclass(frozen=True, kw_only=True)
class Compress(Checked):
    """The cache that the model is trained for."""

    method: Annotated[str, "of `keepkv methods`; one that only drops slots"] = "g-kv"
    budget: Annotated[int | float | str, "slots per KV head, a share of the tokens, or bytes"] = 64
    every: Annotated[Size | None, "decoded tokens between compressions; null: as the method has it"] = None
    options: Annotated[dict[str, Any], "of the method, such as {window: 8}"] = dataclasses.field(default_factory=dict)
    calibration: Annotated[str | None, "its file, for a method that needs one"] = None

    def cache(self, model: Any, seed: int = 0, trained: bool = False) -> Cache:
        """A fresh cache for ``model``. Raises ``KeepKVError`` where it could not be replayed.

        trained: the weights are no longer those that the calibration was made with, which is used all the same.
        """
        known = loaded(self.calibration)
        if trained and known:
            now = fingerprint(inner_model(model))
            known = [dataclasses.replace(one, fingerprint=now) for one in known]
        when = {} if self.every is None else {"when": When(every=self.every)}
        made = Cache(model, self.method, self.budget, seed=seed, calibration=known, **{**self.options, **when})
        check_replayable(made)
        return made


@dataclass(frozen=True, kw_only=True)
class Data(Checked):
    """The texts."""

    source: Annotated[str, 'a file of JSON lines {"prompt": …, "reply": …}, or a task of `keepkv tasks`'] = (
        "long-decode"
    )
    length: Annotated[Size, "tokens of each context of a task"] = 64
    items: Annotated[Size, "contexts of a task"] = 1024
    seed: Annotated[Count, "of the first of them"] = 0
    together: Annotated[bool, "all questions of a context in one text, rather than one text each"] = False
    longest: Annotated[Size | None, "longer texts are left out; null: none are"] = None
    options: Annotated[dict[str, Any], "of the task, such as {kind: copy}"] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Optimise(Checked):
    """The steps. Each takes `batch` × `accumulate` texts."""

    steps: Annotated[Size, "of the optimiser, AdamW"] = 200
    batch: Annotated[Size, "texts that are in memory together"] = 8
    accumulate: Annotated[Size, "such batches for each step"] = 1
    learning_rate: Annotated[Positive, "at its peak"] = 1e-4
    schedule: Annotated[str, one_of("cosine", "linear", "constant_with_warmup"), "how it falls"] = "cosine"
    warmup: Annotated[Share, "share of the steps in which it rises"] = 0.05
    weight_decay: Annotated[Amount, "of AdamW"] = 0.0
    clip: Annotated[Positive, "largest norm of a gradient"] = 1.0
    checkpointing: Annotated[bool, "gradient checkpointing: less memory, a third more time"] = False
    save_every: Annotated[Size, "steps from one checkpoint to the next; a killed run goes on from the last"] = 50
    seed: Annotated[Seed, "of the order of the texts, of adapters and of methods that draw"] = 0


@dataclass(frozen=True, kw_only=True)
class Lora(Checked):
    """Adapters instead of all weights, by PEFT."""

    rank: Annotated[Count, "0: none, all weights are trained"] = 0
    alpha: Annotated[Positive, "scale of the adapters"] = 16.0
    dropout: Annotated[Share, "of their input"] = 0.0
    targets: Annotated[str, "which layers, as PEFT names them"] = "all-linear"


@dataclass(frozen=True, kw_only=True)
class Common(Checked):
    """What every training has."""

    out: Annotated[str, "folder for checkpoints, the curve and the model"]
    model: Annotated[str | None, "directory or Hub name; null: the embedded model"] = None
    device: Annotated[str, "cpu, cuda, …; auto: a GPU where there is one"] = "auto"
    dtype: Annotated[str, "of the weights"] = "float32"
    mixed: Annotated[bool, "bfloat16 arithmetic on these weights, on a GPU"] = False
    compress: Compress = dataclasses.field(default_factory=Compress)
    data: Data = dataclasses.field(default_factory=Data)
    optimise: Optimise = dataclasses.field(default_factory=Optimise)
    lora: Lora = dataclasses.field(default_factory=Lora)


@dataclass(frozen=True, kw_only=True)
class Distill(Common):
    """Distillation from the full cache into the compressed model."""

    temperature: Annotated[Positive, "that both distributions are divided by"] = 0.6


@dataclass(frozen=True, kw_only=True)
class Sft(Common):
    """Supervised fine-tuning under eviction."""


def read(kind: type[T], path: str | Path) -> T:
    """The config of type ``kind`` in a YAML file. Raises ``KeepKVError`` where it is none, and names the nearest known
    key where one is not known."""
    yaml = _yaml()
    try:
        given = yaml.safe_load(text_of(Path(path).expanduser()))
    except yaml.YAMLError as error:
        raise KeepKVError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    return of_dict(kind, given, Path(path).name)


def of_dict(kind: type[T], given: Any, where: str) -> T:
    """The config of type ``kind`` in plain data; ``where`` begins what is said of it."""
    if not isinstance(given, Mapping):
        raise KeepKVError(f"{where}: {shown(given)} is not a mapping of keys to values")
    known: dict[str, Any] = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    values = {}
    for name, value in given.items():
        if name not in known:
            raise UnknownName(f"key in {where}:", str(name), known)
        inner = _inner(kind, name)
        values[name] = value if inner is None else of_dict(inner, value, f"{where}, {name}")
    missing = [name for name, one in known.items() if name not in values and not _has_default(one)]
    if missing:
        raise KeepKVError(f"{where}: no {', '.join(missing)}; `keepkv train … --example` prints a whole file")
    try:
        return kind(**values)
    except KeepKVError as error:
        raise type(error)(f"{where}: {error}") from None


def to_yaml(config: Checked) -> str:
    """The whole of ``config`` as a YAML file that ``read`` takes."""
    text: str = _yaml().safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)  # type: ignore[call-overload]
    return text


def example(config: Checked) -> str:
    """``to_yaml`` with what each key is behind it."""
    kind: Any = type(config)
    section, made = kind, []
    for line in to_yaml(config).splitlines():
        name = line.strip().partition(":")[0]
        if not line.startswith(" "):
            section = _inner(kind, name) or kind
        says = _says(section, name) if section is kind or line.startswith(" ") else section.__doc__
        made.append(f"{line:<30}  # {says}" if says else line)
    return "\n".join(made) + "\n"


def _says(kind: Any, name: str) -> str | None:
    """What stands in the annotation of a key."""
    return next((one for one in get_args(hints_of(kind).get(name)) if isinstance(one, str)), None)


def _inner(kind: Any, name: str) -> type[Any] | None:
    """The dataclass of a section; None for a plain key."""
    hint = hints_of(kind)[name]
    return hint if dataclasses.is_dataclass(hint) and isinstance(hint, type) else None


def _has_default(one: Any) -> bool:
    return one.default is not MISSING or one.default_factory is not MISSING


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise KeepKVError("training reads YAML, and PyYAML is not installed: pip install 'keepkv[train]'") from error
    return yaml
