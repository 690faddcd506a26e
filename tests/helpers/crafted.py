"""Cache files as somebody with bad intentions, or a bad disk, makes them: edited, with a checksum that fits."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zoo
from running import batch, generate
from safetensors import safe_open
from torch import Tensor

import keepkv
from keepkv.core import tensorfile
from keepkv.engine.files.header import FORMAT
from keepkv.engine.versions import CACHE
from keepkv.errors import CacheFileError, CalibrationError, KeepKVError

DEEP = "[" * 100_000
VALUES: dict[str, Any] = {
    "text": "pwn", "list": [], "object": {}, "null": None, "true": True, "fraction": 1.5, "negative": -1, "zero": 0,
    "huge": 10**12, "beyond": 10**30, "far": 1e308, "nan": float("nan"), "infinite": float("inf"), "long": "9" * 5000,
    "nested": [[[[[[[[[]]]]]]]]],
}  # fmt: skip


@dataclass
class File:
    """What a file holds."""

    header: Any
    tensors: dict[str, Tensor]
    text: str | None = None  # of the header, where no JSON makes it

    @classmethod
    def read(cls, path: Path) -> File:
        with safe_open(path, "pt") as file:  # the library that the format is named after reads it
            return cls(json.loads(file.metadata()["header"]), {name: file.get_tensor(name) for name in file.keys()})

    def write(self, path: Path) -> None:
        text = json.dumps(self.header) if self.text is None else self.text
        tensorfile.write(path, FORMAT, text, self.tensors)


Edit = Callable[[File], None]


@dataclass
class Victim:
    """A cache that was saved, and what it answers."""

    name: str
    arch: str
    file: File
    answer: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def model(self) -> Any:
        return zoo.model(self.arch)

    def judge(self, path: Path, turns: tuple[int, ...] = (1, 4, 1)) -> str:
        """What becomes of the file at ``path``: "refused", "equal" to the original, or "other", which is a cache all
        the same. Anything else raises. turns: tokens of the forwards that it is asked to go on with; without any it is
        "loaded"."""
        try:
            cache = keepkv.Cache.load(path, self.model)
        except (CacheFileError, CalibrationError) as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, error
            return "refused"
        if not turns:
            return "loaded"
        try:
            logits = answer(self.model, cache, turns)
        except KeepKVError:
            return "other"
        assert bool(logits.isfinite().all())
        return (
            "equal" if logits.shape == self.answer.shape and torch.allclose(logits, self.answer, atol=1e-4) else "other"
        )


def answer(model: Any, cache: keepkv.Cache, turns: tuple[int, ...] = (1, 4, 1)) -> Tensor:
    """Logits of a copy that goes on: with a token, a second turn, and a token after it."""
    twin, out = cache.copy(), []
    rows = max(1, len(twin.seen))
    columns = max((layer.get_seq_length() for layer in twin.layers), default=0)
    with torch.no_grad():
        for length in turns:
            feed = torch.arange(5, 5 + length).expand(rows, length)
            mask = torch.cat(
                (twin.attention_mask(0) if columns else torch.ones(rows, 0).long(), torch.ones(rows, length).long()), 1
            )
            positions = (mask.cumsum(-1) - 1)[:, -length:].clamp_min(0)
            out.append(model(feed, attention_mask=mask, position_ids=positions, **{CACHE: twin}).logits)
            columns += length
    twin.report()
    return torch.cat(out, 1)


def victims(folder: Path) -> list[Victim]:
    """Caches of every layout, with and without codec, spans, statistics, remembered queries and sliding windows."""
    small = {"window": 4, "sinks": 2}
    often = keepkv.When(every=3)
    made = {
        "dense": ("llama", "keepkv", 14, {}),
        "ragged": ("llama", "adakv", 0.5, {"spans": [keepkv.Span(3, 9, name="a"), keepkv.Span(0, 3, "protect")]}),
        "int8": ("llama", "snapkv", 40, {"codec": "int8", "when": often}),
        "static": ("llama", "h2o", 20, {"store": "static", "store_options": {"capacity": 80}, "when": often}),
        "windows": ("gemma3", "r-kv", 20, {"when": often}),
    }
    out = []
    for name, (arch, method, budget, options) in made.items():
        model, path = zoo.model(arch), folder / f"{name}.safetensors"
        cache = keepkv.Cache(model, method, budget, **{**small, **options})
        generate(model, batch((61, 33)), cache)
        cache.save(path)
        again = keepkv.Cache.load(path, model)
        out.append(Victim(name, arch, File.read(path), answer(model, again)))
    return out


# --- edits by hand -----------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in plain data: every field of every object, and the first of every list."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for name, one in inside:
        yield (*path, name)
        yield from places(one, (*path, name))


def edits(file: File) -> Iterator[tuple[str, Edit]]:
    """A table: every field × what may be wrong with it, every tensor × the same."""
    for path in places(file.header):
        for name, value in VALUES.items():
            yield f"{path} {name}", lambda f, path=path, value=value: put(f, path, value)
        yield f"{path} missing", lambda f, path=path: put(f, path, None, "missing")
        if isinstance(path[-1], str):
            yield f"{path} renamed", lambda f, path=path: put(f, path, None, "renamed")
            yield f"{path} extra", lambda f, path=path: put(f, path, 1, "extra")
    for name, x in file.tensors.items():
        for what, edit in TENSORS.items():
            yield f"{name} {what}", lambda f, name=name, edit=edit: edit(f.tensors, name)
        for dim in range(x.dim()):
            yield f"{name} shorter {dim}", lambda f, name=name, dim=dim: shorten(f.tensors, name, dim)
            yield f"{name} longer {dim}", lambda f, name=name, dim=dim: lengthen(f.tensors, name, dim)
    for text in (
        "",
        "[]",
        "null",
        DEEP,
        '{"a":' * 50_000,
        "9" * 5000,
        '{"method": "full", "method": "full"}',
        "\ud7ff",
    ):
        yield f"header {text[:20]}", lambda f, text=text: setattr(f, "text", text)


def put(file: File, path: tuple[Any, ...], value: Any, what: str = "") -> None:
    """Put ``value`` where ``path`` leads, or take away, rename or add to what stands there."""
    at = file.header
    for name in path[:-1]:
        at = at[name]
    if what in ("missing", "renamed"):
        held = at.pop(path[-1])
        if what == "renamed":
            at[f"_{path[-1]}"] = held
    else:
        at["pwn" if what == "extra" else path[-1]] = value


def filled(value: float) -> Callable[[dict[str, Tensor], str], None]:
    def edit(tensors: dict[str, Tensor], name: str) -> None:
        x = tensors[name]
        if not x.is_floating_point() and x.dtype != torch.bool:
            bound = torch.iinfo(x.dtype)
            tensors[name] = torch.full_like(
                x, int(max(bound.min, min(bound.max, value))) if value == value else bound.min
            )
        else:
            tensors[name] = torch.full_like(x, value)

    return edit


def one(value: float) -> Callable[[dict[str, Tensor], str], None]:
    def edit(tensors: dict[str, Tensor], name: str) -> None:
        x = tensors[name].clone()
        if x.numel():
            like: dict[str, Tensor] = {name: x.reshape(-1)[-1:]}
            filled(value)(like, name)
            x.view(-1)[-1:] = like[name]
        tensors[name] = x

    return edit


def cast(dtype: torch.dtype) -> Callable[[dict[str, Tensor], str], None]:
    def edit(tensors: dict[str, Tensor], name: str) -> None:
        tensors[name] = tensors[name].to(dtype)

    return edit


def shorten(tensors: dict[str, Tensor], name: str, dim: int) -> None:
    tensors[name] = tensors[name].narrow(dim, 0, max(0, tensors[name].shape[dim] - 1)).clone()


def lengthen(tensors: dict[str, Tensor], name: str, dim: int) -> None:
    x = tensors[name]
    tensors[name] = torch.cat((x, x.narrow(dim, 0, min(1, x.shape[dim]))), dim)


TENSORS: dict[str, Callable[[dict[str, Tensor], str], None]] = {
    "missing": lambda tensors, name: void(tensors.pop(name)),
    "renamed": lambda tensors, name: tensors.update({f"{name}_": tensors.pop(name)}),
    "moved": lambda tensors, name: tensors.update({f"9.{name}": tensors.pop(name)}),
    "extra": lambda tensors, name: tensors.update({f"{name}.more": tensors[name]}),
    "flat": lambda tensors, name: tensors.update({name: tensors[name].reshape(-1)}),
    "deep": lambda tensors, name: tensors.update({name: tensors[name][None]}),
    "half": cast(torch.float16), "double": cast(torch.float64), "bytes": cast(torch.uint8), "long": cast(torch.int64),
    "int": cast(torch.int32), "bool": cast(torch.bool), "brain": cast(torch.bfloat16),
    "nan": filled(float("nan")), "one nan": one(float("nan")), "infinite": filled(float("inf")),
    "one infinite": one(float("-inf")), "huge": filled(1e18), "one huge": one(1e11), "negative": filled(-1.0),
    "one negative": one(-7.0), "zero": filled(0.0), "one": one(1.0),
}  # fmt: skip


def void(value: object) -> None:
    """For what returns something that nobody wants."""


# --- edits by chance ---------------------------------------------------------------------------------------------


def by_chance(file: File, rng: random.Random) -> File:
    """``file`` with one to three bytes of its header's text or of a tensor changed, taken out or put in."""
    text, tensors = json.dumps(file.header), dict(file.tensors)
    changed = None
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.5:
            data = list(changed or text)
            at = rng.randrange(len(data))
            kind = rng.randrange(3)
            new = rng.choice('0123456789-+.eE,:[]{}" aZ\\~')
            data[at : at + (kind != 2)] = [] if kind == 1 else [new]
            changed = "".join(data)
        else:
            name = rng.choice(sorted(tensors))
            x = tensors[name].contiguous().clone()
            if x.numel():
                held = x.reshape(-1).view(torch.uint8)
                held[rng.randrange(len(held))] = rng.randrange(256)
            tensors[name] = x
    return File(file.header, tensors, changed)


def edited(file: File, edit: Edit) -> File:
    """``file`` after ``edit``; the original stays."""
    twin = File(copy.deepcopy(file.header), dict(file.tensors))
    edit(twin)
    return twin
