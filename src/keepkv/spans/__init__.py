"""Spans: parts of a prompt that keep a fair share of the budget, or all of their tokens (arXiv 2510.00231)."""

from keepkv.spans.base import Span, SpanPolicy
from keepkv.spans.from_text import TokenSpans, spans_of_chat, spans_of_text
from keepkv.spans.rows import RowSpans

__all__ = ["RowSpans", "Span", "SpanPolicy", "TokenSpans", "spans_of_chat", "spans_of_text"]
