"""Methods that keep what future queries are expected to attend to."""

from __future__ import annotations

from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.score.expected import ExpectedAttention


@register_method("expected-attention", paper="arXiv 2510.00636")
def expected_attention(
    horizon: int = 512,
    epsilon: float = 0.0,
    epsilon_mode: str = "absolute",
    use_covariance: bool = True,
    value_norm: str | None = "v",
    position_average: str = "rotation",
    shrinkage: float | str = 0.0,
    sinks: int = 4,
    window: int = 0,
    when: When = When(),
) -> Method:
    """Keeps the slots with the largest expected contribution to the output of the next ``horizon`` queries.

    Score = mean over query heads of (softmax of log E[exp(q·k·scaling)] + ε)·‖v‖, q Gaussian with the statistics of
    the row's queries before RoPE, turned by the mean rotation over the horizon. ε is 0 as in kvpress and in the paper's
    needle tests; the paper's other results use 0.02. The statistics cover the whole row, ``sinks`` excluded, and go on
    while decoding (``When(every=512)`` in the paper). See ``keepkv.score.ExpectedAttention`` for every option.
    """
    score = ExpectedAttention(
        horizon=horizon,
        n_sink=sinks,
        epsilon=epsilon,
        epsilon_mode=epsilon_mode,
        use_covariance=use_covariance,
        value_norm=value_norm,
        position_average=position_average,
        shrinkage=shrinkage,
    )
    options = {
        "horizon": horizon,
        "epsilon": epsilon,
        "epsilon_mode": epsilon_mode,
        "use_covariance": use_covariance,
        "value_norm": value_norm,
        "position_average": position_average,
        "shrinkage": shrinkage,
    }
    return Method(score=score, when=when, sinks=sinks, window=window, name="expected-attention", options=options)
