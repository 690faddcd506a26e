"""Judge a token by its key and value: no query has a say."""

from __future__ import annotations

from keepkv.allocate.base import Allocate
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.methods.pieces import as_allocation
from keepkv.score.content.compactor import Compactor
from keepkv.score.content.keydiff import KeyDiff
from keepkv.score.content.knorm import KNorm


@register_method("knorm", paper="arXiv 2406.11430")
def knorm(sinks: int = 4, window: int = 0, when: When = When()) -> Method:
    """Keeps the slots whose keys have the smallest norm: score −‖k‖₂.

    The paper compresses all layers but the first two; here every layer is compressed, as in kvpress. Where a model
    norms its keys (QK-norm), norms hardly differ and the choice means little.
    """
    return Method(KNorm())


@register_method("keydiff", paper="arXiv 2504.15364")
def keydiff(sinks: int = 4, window: int = 0, when: When = When()) -> Method:
    """Keeps the slots whose keys are least like the average key: score −cos(k, mean of normalised keys).

    The paper runs it block by block over a chunked prefill: chunk the prefill, with ``When("immediate")``.
    """
    return Method(KeyDiff())


@register_method("compactor", paper="arXiv 2507.08143")
def compactor(
    blending: float | None = None, chunk: int = 256, sketch: int = 48, ridge: float = 1e-2, scaled: bool = False,
    allocate: str | Allocate = "uniform", sinks: int = 8, window: int = 4, when: When = When(),
) -> Method:  # fmt: skip
    """Keeps the slots whose keys are unlike the others, or that tokens before and behind them attend to.

    Score = λ·z(leverage of the key before RoPE, of a Gaussian sketch to ``sketch`` dims) + z(attention·‖v‖), where the
    tokens of each ``chunk`` attend to all of it, later tokens too, and z has mean 0 and variance 1 over the heads of a
    layer. λ = ``blending``; None is the share of tokens that leaves, as in the code that the authors gave kvpress. All
    heads get the same budget there; ``allocate="adakv"`` shares a layer's by score. sinks, window: first and most
    recent tokens, kept and left out of the score. See ``keepkv.score.Compactor``.

    Not here: the paper's calibration, which finds the budget that a context can do with.

    Options:
        blending: weight of the leverage against the attention; none: the share of tokens that leaves
        chunk: tokens that attend to each other for the score
        sketch: dimensions of the sketch of the keys
        ridge: is added to the Gram matrix of the keys
        scaled: whether the attention takes the model's scaling
    """
    return Method(Compactor(blending, chunk, sketch, ridge, scaled, sinks, window), as_allocation(allocate))
