"""When a cache is compressed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from keepkv.core.options import Checked, Size, one_of


@dataclass(frozen=True)
class When(Checked):
    """Schedule of compressions.

    prefill: ``"immediate"`` compresses each layer right after its attention in every forward of more than one
        token (lowest peak; with chunked prefill: after every chunk). ``"deferred"`` compresses at the start of the
        first one-token forward that follows, so that chunked prefill equals one-shot prefill. ``None``: never.
    every: also compress after this many decoded tokens since the last compression; ``None``: never while decoding.
    cap: a hard cap, in slots per KV head: a compression runs before a forward would pass it, so that no layer ever
        holds more, whatever is read or decoded: an average over the heads that share a budget, those of a layer, or of
        all layers where an allocation is joint; exact where heads keep the same number. The budget is what such a
        compression leaves, a share of the tokens no more than has room beside the forward. A forward that does not fit
        then is refused. With ``prefill=None`` it is all that starts a compression: a stream. ``None``: no cap.
    """

    prefill: Annotated[str, one_of("immediate", "deferred")] | None = "immediate"
    every: Size | None = None
    cap: Size | None = None

    form: ClassVar[str] = "a keepkv.When, such as keepkv.When('deferred') or keepkv.When(every=64)"

    def __repr__(self) -> str:
        cap = "" if self.cap is None else f", cap={self.cap}"
        return f"When(prefill={self.prefill!r}, every={self.every}{cap})"

    @property
    def recurs(self) -> bool:
        """Whether a compression may come while tokens are decoded."""
        return self.every is not None or self.cap is not None
