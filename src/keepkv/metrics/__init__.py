"""What compression changes, as plain functions on tensors: no model, no cache, no labels."""

from keepkv.metrics.difference import common_prefix, kl, relative_error, top1_agreement
from keepkv.metrics.effivlm import AGGREGATES, Ratios, overall_generalisation, overall_performance, ratios
from keepkv.metrics.flips import Flips, flips
from keepkv.metrics.loyalty import Loyalty, casefolded, identity, overall_loyalty, same_answer
from keepkv.metrics.pareto import frontier
from keepkv.metrics.rouge import rouge_1, rouge_l, verbatim

__all__ = [
    "AGGREGATES", "Flips", "Loyalty", "Ratios", "casefolded", "common_prefix", "flips", "frontier", "identity", "kl",
    "overall_generalisation", "overall_loyalty", "overall_performance", "ratios", "relative_error", "rouge_1",
    "rouge_l", "same_answer", "top1_agreement", "verbatim",
]  # fmt: skip
