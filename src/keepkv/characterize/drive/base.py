"""What a driver is: whatever answers requests and says when each token came."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from keepkv.characterize.workload.calls import Call


@dataclass
class Timeline:
    """What became of one request; a driver fills it as it goes, so that one that is cut off still says what came.

    arrive: when it was due. admit: when work on it began, None where that is not told. times: of each token, or piece
    of text. end: of the last, None while it runs. tokens: ids of the reply, None where text is all there is. kv: bytes
    and seconds, by the names of ``RequestRow``. Times are of ``time.perf_counter``.
    """

    call: Call
    arrive: float
    admit: float | None = None
    times: list[float] = field(default_factory=list)
    end: float | None = None
    text: str = ""
    tokens: list[int] | None = None
    n_in: int | None = None
    n_out: int | None = None
    cached: int | None = None
    kv: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


class Driver(Protocol):
    """Answers requests, several at once where it can."""

    async def send(self, line: Timeline) -> None:
        """Answer ``line.call`` and fill ``line``. What fails is an error of that line, and raised by nobody."""

    def peak_bytes(self) -> int | None:
        """The most memory, weights included, of the process that holds the model; None where it is not told."""

    def made_with(self) -> dict[str, Any]:
        """``model``, ``device``, ``dtype`` and ``versions`` of what answers, as ``MadeWith`` has them."""

    async def close(self) -> None:
        """End it. What is still under way is dropped."""
