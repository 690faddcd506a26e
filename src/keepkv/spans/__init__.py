"""Spans: parts of a prompt that keep a fair share of the budget, or all of their tokens (arXiv 2510.00231)."""

from keepkv.spans.base import Span, SpanPolicy
from keepkv.spans.rows import RowSpans

__all__ = ["RowSpans", "Span", "SpanPolicy"]
