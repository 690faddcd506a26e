"""Texts as the batches of tokens that a calibration reads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from keepkv.errors import CalibrationError
from keepkv.evaluation.fidelity.segments import tokenise


def batches(tokenizer: Any, texts: Sequence[str], tokens: int, length: int) -> list[Tensor]:
    """Pieces (1,T) int64 of ``texts``, T ≤ ``length``, with ``tokens`` tokens in all, or fewer where there are no more.

    Texts take turns, so that each has its say when ``tokens`` are few. Each piece begins with the token that the
    tokenizer starts a text with. Raises ``CalibrationError`` where the texts are empty.
    """
    cut = []
    for text in texts:
        ids, start = tokenise(tokenizer, text)
        lead = ids.new_tensor([] if start is None else [start])
        own = max(1, length - len(lead))
        cut.append([torch.cat((lead, ids[i : i + own]))[None] for i in range(0, len(ids), own)])
    made: list[Tensor] = []
    for piece in chain.from_iterable(zip_longest(*cut)):
        if piece is not None and tokens > 0:
            made.append(piece[:, :tokens])
            tokens -= made[-1].shape[1]
    if not made:
        raise CalibrationError("the texts are empty: give --text FILE with a text to calibrate on")
    return made
