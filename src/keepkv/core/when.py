"""When a cache is compressed."""

from __future__ import annotations

from dataclasses import dataclass

from keepkv.errors import KeepKVError


@dataclass(frozen=True)
class When:
    """Schedule of compressions.

    prefill: ``"immediate"`` compresses each layer right after its attention in every forward of more than one
        token (lowest peak; with chunked prefill: after every chunk). ``"deferred"`` compresses at the start of the
        first one-token forward that follows, so that chunked prefill equals one-shot prefill. ``None``: never.
    every: also compress after this many decoded tokens since the last compression; ``None``: never while decoding.
    """

    prefill: str | None = "immediate"
    every: int | None = None

    def __post_init__(self) -> None:
        if self.prefill not in ("immediate", "deferred", None):
            raise KeepKVError(f"When(prefill={self.prefill!r}): supported are 'immediate', 'deferred' and None")
        if self.every is not None and self.every < 1:
            raise KeepKVError(f"When(every={self.every!r}): a number of decoded tokens of at least 1, or None")
