"""What is known of a context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ContextInfo:
    """A context by name.

    tokens: that were read. bytes: of its compressed cache. full_bytes: of a plain cache of the same tokens. method,
    budget: what it was compressed with. created: seconds since 1970. in_memory: whether its cache is, rather than in
    its file alone. receipt: what its cache reported, as ``keepkv.Receipt.to_dict``. survival: for each token which
    share of all heads holds it. text: what it was made of, as it was given. problem: why it cannot be asked, as where
    its file was made with another model; None: it can.
    """

    name: str
    tokens: int
    bytes: int
    full_bytes: int
    method: str
    budget: float | int | str
    created: float
    in_memory: bool
    receipt: Mapping[str, Any]
    survival: tuple[float, ...]
    text: str
    problem: str | None = None
