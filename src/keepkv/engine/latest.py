"""What a score has still to see of the latest forward of a layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Latest(NamedTuple):
    """query (B,Hq,T,D); of one token whose attention the score follows, weights (B,H,G,S); where it asks for them, the
    hidden states (B,T,E) that the attention module was fed; whether it read a prompt, or the end of one."""

    query: Tensor
    weights: Tensor | None
    hidden: Tensor | None = None
    prompt: bool = False

    def part(self, columns: slice, copy: bool = False) -> Latest:
        """Some of its tokens, without weights. copy: so that nothing holds the others."""
        kept = (self.query[:, :, columns], None if self.hidden is None else self.hidden[:, columns])
        query, hidden = (x.clone() if copy and x is not None else x for x in kept)
        assert query is not None
        return Latest(query, None, hidden, self.prompt)

    def of_rows(self, rows: Tensor) -> Latest:
        """Of the present ``rows`` (R,), without weights."""
        hidden = None if self.hidden is None else self.hidden.index_select(0, rows)
        return Latest(self.query.index_select(0, rows), None, hidden, self.prompt)
