"""The process that measures one row of keepkv or transformers: ``python -m keepkv.bench.worker``."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import DynamicCache, QuantizedCache

from keepkv.bench.protocol import Measurement, Runner, prepare, serve
from keepkv.bench.systems import QUANTISED
from keepkv.core.plugins import load_file
from keepkv.core.when import When
from keepkv.engine.cache import Cache
from keepkv.errors import KeepKVError
from keepkv.measure import meters
from keepkv.measure.content import content
from keepkv.measure.environment import versions


class KeepKV(Runner):
    """A method of keepkv."""

    def __init__(self, model: Any, spec: dict[str, Any]) -> None:
        super().__init__(model)
        when = spec["options"].get("when")
        self.options = spec["options"] | ({"when": When(**when)} if isinstance(when, dict) else {})
        self.spec = spec

    def start(self) -> Cache:
        spec = self.spec
        cache = Cache(
            self.model, spec["method"], spec["budget"], store=spec["store"], store_options=spec["store_options"],
            seed=spec["seed"], **self.options,
        )  # fmt: skip
        cache.shared.clock = lambda: meters.now(self.device)  # waits for a GPU to finish
        return cache

    def compression(self, cache: Any) -> float:
        seconds: float = cache.report().seconds
        return seconds

    def content(self, cache: Any) -> tuple[int, int]:
        return content(cache)

    def facts(self, cache: Any) -> dict[str, Any]:
        receipt = cache.report()
        heads = [slots for layer in receipt.kept.values() for row in layer for slots in row]
        names = ("bytes", "full_bytes", "merged", "dropped", "compressed", "compressions")
        return {name: getattr(receipt, name) for name in names} | {"slots": sum(heads) / max(1, len(heads))}

    def rewind(self, cache: Any, tokens: int) -> None:
        # Where it compressed meanwhile it cannot, and need not: it is at its bound and stays there.
        if all(layer.store.appended >= tokens for layer in cache.compressible):
            cache.crop(-tokens)


class Plain(Runner):
    """transformers' own growing cache."""

    def start(self) -> Any:
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    def content(self, cache: Any) -> tuple[int, int]:
        return content(cache)

    def facts(self, cache: Any) -> dict[str, Any]:
        held = content(cache)[0]
        return {"bytes": held, "full_bytes": held, "slots": float(cache.get_seq_length())}

    def rewind(self, cache: Any, tokens: int) -> None:
        cache.crop(-tokens)


class Quantised(Plain):
    """transformers' quantised caches."""

    def __init__(self, model: Any, name: str) -> None:
        super().__init__(model)
        self.backend, self.bits = QUANTISED[name]

    def start(self) -> Any:
        bits = {} if self.bits is None else {"nbits": self.bits}
        try:
            return QuantizedCache(self.backend, self.model.config, **bits)
        except ValueError as error:
            raise KeepKVError(
                f"transformers {transformers.__version__} has no quantised cache {self.backend!r} ({error}): take a "
                "newer one, or leave this peer out"
            ) from error

    def facts(self, cache: Any) -> dict[str, Any]:
        # What a plain cache would hold is arithmetic here, which the parent does.
        return super().facts(cache) | {"full_bytes": None}

    def rewind(self, cache: Any, tokens: int) -> None:
        """Packed groups cannot be taken apart: it goes on."""


def runner(model: Any, spec: dict[str, Any]) -> Runner:
    """What ``spec`` asks for; the model's attention is set to what belongs to it."""
    for path in spec.get("imports", ()):
        load_file(path)
    if spec["library"] == "keepkv":
        return KeepKV(model, spec)
    model.set_attn_implementation("sdpa")
    return Plain(model) if spec["method"] == "plain" else Quantised(model, spec["method"])


def build(spec: dict[str, Any]) -> tuple[Measurement, dict[str, Any]]:
    """The measurement that ``spec`` asks for."""
    return prepare(spec, lambda model: runner(model, spec), meters, versions())


if __name__ == "__main__":
    serve(build)
