"""A document and questions about it: read once, compressed, asked many times."""

from keepkv.asking.ask import Answers, ask
from keepkv.asking.context import Context
from keepkv.asking.pipeline import AskPipeline

__all__ = ["Answers", "AskPipeline", "Context", "ask"]
