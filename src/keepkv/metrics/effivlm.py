"""What EffiVLM-Bench (arXiv 2506.00479) makes of the scores of several models on several benchmarks.

ρ[m,b] = score compressed / score of the full cache, of model m on benchmark b. A benchmark whose full score is 0 has no
ratio: it is left out, and named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

AGGREGATES = ("rms", "mean", "min")
Scores = Mapping[str, float]  # of one model, by benchmark


@dataclass(frozen=True)
class Ratios:
    """rho: by benchmark. left_out: benchmarks without one."""

    rho: dict[str, float]
    left_out: tuple[str, ...] = ()


def ratios(compressed: Scores, full: Scores) -> Ratios:
    """ρ of each benchmark in ``compressed``. Raises ``ValueError`` where ``full`` lacks one."""
    if missing := sorted(set(compressed) - set(full)):
        raise ValueError(f"no score of the full cache on {', '.join(missing)}: ratios need one for each benchmark")
    return Ratios(
        {name: score / full[name] for name, score in compressed.items() if full[name] != 0},
        tuple(name for name in compressed if full[name] == 0),
    )


def overall_performance(rho: Sequence[float], aggregate: str = "rms") -> float:
    """OP of one model: √(mean_b ρ²) as published; "mean" and "min" beside it.

    The root mean square rewards ratios above 1, and forgives zeros more than a product would.
    """
    if not rho:
        raise ValueError("OP needs the ratio of at least one benchmark")
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate={aggregate!r}: supported are {', '.join(AGGREGATES)}")
    if aggregate == "rms":
        return math.sqrt(fmean(x * x for x in rho))
    return fmean(rho) if aggregate == "mean" else min(rho)


def overall_generalisation(rho: Mapping[str, Scores]) -> float:
    """OG in per cent, lower is better: 100 · std_b(q) / mean_b(q), q_b = mean over models of ρ[m,b], population std.

    rho: of each model, by benchmark; over the benchmarks that all of them have. It ignores disagreement between models,
    and is small for a method that is bad everywhere: never rank by it alone. NaN where every ratio is 0.
    """
    if not rho:
        raise ValueError("OG needs at least one model")
    shared = set.intersection(*(set(own) for own in rho.values()))
    if not shared:
        raise ValueError("OG needs a benchmark that all models have")
    q = [fmean(own[name] for own in rho.values()) for name in sorted(shared)]
    return 100 * pstdev(q) / fmean(q) if any(q) else math.nan
