"""Judge a token by its key and value: no query has a say."""

from __future__ import annotations

from keepkv.allocate.base import Allocate
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.methods.pieces import as_allocation
from keepkv.score.content.compactor import Compactor
from keepkv.score.content.curdkv import CurDKV
from keepkv.score.content.keydiff import KeyDiff
from keepkv.score.content.knorm import KNorm
from keepkv.score.content.lagkv import LagKV
from keepkv.score.content.leverage_score import LeverageScore
from keepkv.score.learned.qfilter import QFilter


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


@register_method("leverage-score", paper="arXiv 2507.08143")
def leverage_score(
    sketch: int = 48, ridge: float = 1e-2, sinks: int = 4, window: int = 0, when: When = When()
) -> Method:
    """Keeps the slots whose keys before RoPE are unlike the others: Compactor's leverage, without its attention.

    Score = xᵀ(Σ x xᵀ + ``ridge``·I)⁻¹x, x the key less the mean key in a Gaussian sketch of ``sketch`` columns. What
    kvpress has as LeverageScorePress; "compactor" adds the attention.

    Options:
        sketch: columns of the sketch of the keys; 0: the keys as they are
        ridge: is added to the Gram matrix of the keys
    """
    return Method(LeverageScore(sketch, ridge))


@register_method("curdkv", paper="arXiv 2509.15038")
def curdkv(of: str = "product", neighbours: int = 16, sinks: int = 4, window: int = 0, when: When = When()) -> Method:
    """Keeps the slots that have most of the squared length of the keys and values around them.

    Score ∝ ‖k_i‖²/Σ‖k‖² · ‖v_i‖²/Σ‖v‖², the sums over runs of ``neighbours`` tokens. As released in kvpress; the
    paper's random projection, which approximates these lengths, is left out.

    Options:
        of: product, mean, key or value: which shares count
        neighbours: tokens of a run; 0: the whole row is one
    """
    return Method(CurDKV(of, neighbours))


@register_method("lagkv", paper="arXiv 2504.04704")
def lagkv(lag: int = 128, cross: bool = False, sinks: int = 4, window: int = 0, when: When = When()) -> Method:
    """Keeps the slots whose channels vary most, each measured by its range in the next ``lag`` tokens.

    Score = rank, within its run of ``lag`` tokens, of the mean of softmax(std x̂) over keys and values, x̂ the channels
    in units of the next run's range. The last whole run and what follows it stay as long as the budget holds them; the
    paper keeps them whatever it is, and its released code has 16 sinks and runs of 1024.

    Options:
        lag: tokens of a run
        cross: compare the scores themselves between runs and heads, rather than ranks within runs
    """
    return Method(LagKV(lag, sinks, cross))


@register_method("q-filter", paper="arXiv 2503.02812")
def q_filter(sinks: int = 4, window: int = 32, when: When = When()) -> Method:
    """Keeps the slots whose keys lie in the main direction of the model's queries.

    Score = −f·k, f a filter per KV head that is made once per model, from its queries on any text: ``keepkv calibrate
    q-filters``, which also reads the authors' files (``-o published=FOLDER``). Give the file as ``calibration``.
    """
    return Method(QFilter())
