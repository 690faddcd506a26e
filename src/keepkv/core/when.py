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
    """

    prefill: Annotated[str, one_of("immediate", "deferred")] | None = "immediate"
    every: Size | None = None

    form: ClassVar[str] = "a keepkv.When, such as keepkv.When('deferred') or keepkv.When(every=64)"
