"""Compactor: leverage of keys, and the attention of the text with itself."""

from __future__ import annotations

from keepkv.allocate.base import Allocate
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.methods.keepkv import as_allocation
from keepkv.score.compactor import Compactor


@register_method("compactor", paper="arXiv 2507.08143")
def compactor(
    blending: float | None = None,
    chunk: int = 256,
    sketch: int = 48,
    ridge: float = 1e-2,
    scaled: bool = False,
    allocate: str | Allocate = "uniform",
    sinks: int = 8,
    window: int = 4,
    when: When = When(),
) -> Method:
    """Keeps the slots whose keys are unlike the others, or that tokens before and behind them attend to.

    Score = λ·z(leverage of the key before RoPE, of a Gaussian sketch to ``sketch`` dims) + z(attention·‖v‖), where the
    tokens of each ``chunk`` attend to all of it, later tokens too, and z has mean 0 and variance 1 over the heads of a
    layer. λ = ``blending``; None is the share of tokens that leaves, as in the code that the authors gave kvpress. All
    heads get the same budget there; ``allocate="adakv"`` shares a layer's by score. sinks, window: first and most
    recent tokens, kept and left out of the score. See ``keepkv.score.Compactor``.

    Not here: the paper's calibration, which finds the budget that a context can do with.
    """
    return Method(
        score=Compactor(blending, chunk, sketch, ridge, scaled, sinks, window),
        allocate=as_allocation(allocate),
        when=when,
        sinks=sinks,
        window=window,
        name="compactor",
        options={
            "blending": blending, "chunk": chunk, "sketch": sketch, "ridge": ridge, "scaled": scaled,
            "allocate": allocate,
        },
    )  # fmt: skip
