"""Models that see: keep the text and choose among what is seen, or share the budget by what text asks of it."""

from __future__ import annotations

from typing import Annotated

from keepkv.allocate.base import Allocate
from keepkv.allocate.density import Density
from keepkv.allocate.first_layers import FirstLayers
from keepkv.core.options import one_of
from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.methods.pieces import as_allocation, as_score
from keepkv.score.base import Score
from keepkv.score.content.ends import Ends
from keepkv.score.queries.tova import TOVA
from keepkv.score.vision.fastv import FastV
from keepkv.score.vision.text_first import TextFirst
from keepkv.score.vision.vl_cache import VLCache


@register_method("vl-cache", paper="arXiv 2410.23317")
def vl_cache(
    part: float = 0.01, adaptive: float = 1.0, least: float = 0.01, sinks: int = 4, window: int = 32,
    when: When = When(),
) -> Method:  # fmt: skip
    """Keeps what the text behind the last image attends to, with more slots in layers of dense attention.

    Score = Σ of the attention of the queries behind the last vision token; budgets of layers in proportion to their
    density, the share of attention entries that are at least ``part`` of the largest of their query. The paper's window
    is a tenth of the budget; here it is a fixed number of tokens. Text may leave.

    Options:
        part: of the largest attention of a query, from which on an entry counts
        adaptive: 1: layers share by density alone, as published; 0: alike; between: a mixture
        least: part of the mean budget that every layer keeps
    """
    return Method(VLCache(part), Density(adaptive, least))


@register_method("text-first", paper="arXiv 2506.00479")
def text_first(
    score: str | Score = "snapkv", allocate: str | Allocate = "uniform", sinks: int = 4, window: int = 32,
    when: When = When(),
) -> Method:  # fmt: skip
    """Keeps all text, and of what is seen what any score says: the text-protected form of a method.

    Where the budget does not even hold the text, the newest of it stays, and nothing of what was seen.

    Options:
        score: name or Score by which vision is chosen; snapkv looks through the method's window
    """
    return Method(TextFirst(as_score(score, window), 0.0), as_allocation(allocate))


@register_method("fastv", paper="arXiv 2403.06764")
def fastv(
    whole: int = 2, rows: Annotated[str, one_of("all", "last")] = "all", sinks: int = 0, window: int = 0,
    when: When = When(),
) -> Method:  # fmt: skip
    """Keeps everything in the first layers, and in later ones text and the vision that the last of these attends to.

    Score = attention in layer ``whole`` − 1, mean over heads and over all queries ("last": of the last query alone);
    every later layer and head keeps the same tokens. The budget is the mean over layers: see ``FirstLayers``.

    It is FastV as it is held in a cache. There vision leaves the hidden states of later layers while the prompt is
    read; here it leaves their caches when the prompt has been read. So text that comes in a later forward sees what it
    sees there, what stands in the same prompt behind an image has still seen all of it, and reading takes as long as
    without.

    Options:
        whole: first layers that keep everything
        rows: all or last: whose attention counts
    """
    score = TextFirst(TOVA() if rows == "last" else FastV(), 0.0)
    return Method(score, FirstLayers(whole), together=True, led_by=max(0, whole - 1))


@register_method("ends", paper="arXiv 2506.00479")
def ends(recent: float = 0.1, sinks: int = 0, window: int = 0, when: When = When()) -> Method:
    """Keeps the first tokens and a tenth of recent ones: what EffiVLM-Bench measures as StreamingLLM.

    Of B slots the newest max(1, ⌊``recent`` · B⌋) and the first of the others. StreamingLLM itself, four first tokens
    and the most recent ones, is ``streaming-llm``.

    Options:
        recent: share of the budget for the most recent tokens
    """
    return Method(Ends(recent))
