"""What compression changes, as plain functions on tensors: no model, no cache, no labels."""

from keepkv.metrics.difference import common_prefix, kl, relative_error, top1_agreement
from keepkv.metrics.loyalty import Loyalty, casefolded, identity, overall_loyalty, same_answer
from keepkv.metrics.rouge import rouge_1, rouge_l, verbatim

__all__ = [
    "Loyalty", "casefolded", "common_prefix", "identity", "kl", "overall_loyalty", "relative_error", "rouge_1",
    "rouge_l", "same_answer", "top1_agreement", "verbatim",
]  # fmt: skip
