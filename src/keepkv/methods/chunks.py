"""Look at runs of consecutive tokens."""

from __future__ import annotations

from keepkv.core.when import When
from keepkv.methods.base import Method, register_method
from keepkv.methods.pieces import as_score
from keepkv.score.base import Score
from keepkv.score.chunks.block import Block
from keepkv.score.chunks.chunk import Chunk
from keepkv.score.chunks.chunkkv import ChunkKV
from keepkv.score.queries.finch import Finch


@register_method("chunk", paper="arXiv 2408.00167")
def chunk(
    score: str | Score = "snapkv", size: int = 1024, sinks: int = 4, window: int = 32, when: When = When()
) -> Method:
    """Any score, with the same share kept of every run of ``size`` tokens.

    Score = −(slots of the run that are better)/(tokens of the run). The other score is of the whole text; kvpress'
    ChunkPress scores every run as if it were all there is, which for scores of attention means other queries.

    Options:
        score: name or Score
        size: tokens of a run
        window: most recent tokens that are always kept; snapkv looks through them
    """
    return Method(Chunk(as_score(score, window), size))


@register_method("chunkkv", paper="arXiv 2502.00299")
def chunkkv(
    score: str | Score = "snapkv", size: int = 20, spiky: int = 0,
    sinks: int = 4, window: int = 32, when: When = When(),
) -> Method:  # fmt: skip
    """Keeps the runs of ``size`` tokens with the largest mean score, whole, the same in all heads of a layer.

    What is left of the budget goes to the best slots of the next run; kvpress leaves it unused. The paper also lets
    layers keep the runs of the one before; here each chooses. ``spiky=4``: kvpress' entropy-gated press, where good
    runs that owe their score to few tokens give only that many.

    Options:
        score: name or Score
        size: tokens of a run
        spiky: slots that are kept of a good run whose score lies on few of them; 0: all
        window: most recent tokens that are always kept; snapkv looks through them
    """
    return Method(ChunkKV(as_score(score, window), size, spiky), together=True)


@register_method("block", paper="arXiv 2504.15364")
def block(
    score: str | Score = "keydiff", size: int = 128, sinks: int = 4, window: int = 0, when: When = When()
) -> Method:
    """What a score of keys and values would keep if the text had come in blocks of ``size``, each cut to the budget.

    Round by round, the first slots that fit and the next ``size`` are scored among themselves, and the worst leave.
    kvpress' BlockPress: all tokens have seen the whole text. To read a prompt in blocks, where later tokens do not see
    what has left, feed it in chunks with ``When("immediate")`` and any method.

    Options:
        score: name or Score that looks at no query, such as keydiff or knorm
        size: slots that come at a time
    """
    return Method(Block(as_score(score), size))


@register_method("finch", paper="arXiv 2408.00167")
def finch(
    window: int = 32, normalize: bool = True, size: int | None = None, sinks: int = 4, when: When = When()
) -> Method:
    """Keeps what the question attends to: the last ``window`` tokens, which are always kept.

    Score = mean over the question's queries of t·a_i(q_t), t the tokens before q_t. Not as published: the paper reads
    the document piece by piece behind the question, and turns kept keys to positions without gaps; here the question
    stands at the end, say how long it is, and keys stay where they are. ``size``: every run of so many tokens keeps the
    same share.

    Options:
        window: tokens of the question at the end of the prompt
        normalize: whether queries are weighed by the number of tokens before them
        size: tokens of runs that keep the same share; none: the whole text is one
    """
    score = Finch(window, normalize)
    return Method(score if size is None else Chunk(score, size))
