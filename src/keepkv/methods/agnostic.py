"""Query-agnostic methods: they judge a context before any question on it is known."""

from __future__ import annotations

from keepkv.allocate.adakv import AdaKV
from keepkv.allocate.base import Allocate
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.methods.pieces import as_allocation
from keepkv.score.compactor import Compactor
from keepkv.score.expected import ExpectedAttention
from keepkv.score.kvzip import KVzip


@register_method("expected-attention", paper="arXiv 2510.00636")
def expected_attention(
    horizon: int = 512, epsilon: float = 0.0, epsilon_mode: str = "absolute", use_covariance: bool = True,
    value_norm: str | None = "v", position_average: str = "rotation", shrinkage: float | str = 0.0,
    statistics: str = "prompt", sinks: int = 4, window: int = 0, when: When = When(),
) -> Method:  # fmt: skip
    """Keeps the slots with the largest expected contribution to the output of the next ``horizon`` queries.

    Score = mean over query heads of (softmax of log E[exp(q·k·scaling)] + ε)·‖v‖, q Gaussian with the statistics of
    the row's queries before RoPE, turned by the mean rotation over the horizon. ε is 0 as in kvpress and in the paper's
    needle tests; the paper's other results use 0.02. The statistics cover the whole row, ``sinks`` excluded, and go on
    while decoding (``When(every=512)`` in the paper). ``statistics="stored"`` takes those of other texts instead, a
    calibration made once by ``keepkv calibrate query-statistics``: nothing is observed while a row is read. See
    ``keepkv.score.ExpectedAttention`` for every option.

    Options:
        horizon: queries to come that are averaged over
        epsilon: is added to the attention before it is weighed by the value
        epsilon_mode: absolute; relative: epsilon is divided by the number of tokens
        use_covariance: whether the spread of the queries counts, beside their mean
        value_norm: v: weigh by the norm of the value; none: leave it out
        position_average: rotation, moments or mixture: how the queries' positions are averaged
        shrinkage: how far the covariance is drawn to its diagonal, 0 to 1; auto: by the number of tokens
        statistics: prompt: of the queries of the text; stored: of a calibration
    """
    return Method(ExpectedAttention(
        horizon, sinks, epsilon, epsilon_mode, use_covariance, value_norm, position_average, shrinkage,
        statistics=statistics,
    ))  # fmt: skip


@register_method("kvzip", paper="arXiv 2505.23416")
def kvzip(alpha: float = 0.0, sinks: int = 4, window: int = 0, when: When = When()) -> Method:
    """Keeps what the model attends to when it reads the text a second time, behind the first, as if to repeat it.

    It needs that second reading: make the cache with ``when=keepkv.When("deferred")``, feed the context, call
    ``keepkv.reread(model, cache, input_ids)``, then ``cache.compress()``. Without it, as in a plain ``generate``, the
    score is the largest attention during the first reading, which is not KVzip. Score = max over queries and the query
    heads of a KV head; the budget of a layer goes to the highest scores over all its heads, of which each first keeps
    ⌊``alpha`` · budget⌋ (the paper ranks over all layers too).

    Options:
        alpha: share of its budget that each head keeps for itself
    """
    return Method(KVzip(), AdaKV(alpha))


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
