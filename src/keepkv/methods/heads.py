"""Share the budget by heads and layers, whatever the score."""

from __future__ import annotations

from keepkv.allocate.adakv import AdaKV
from keepkv.allocate.curves import Curves
from keepkv.allocate.per_layer import PerLayer
from keepkv.allocate.profile import HeadBudget
from keepkv.allocate.ranked import LazyLayers, RetrievalHeads
from keepkv.core.when import When
from keepkv.errors import UnknownName
from keepkv.methods.base import Method, register_method
from keepkv.methods.pieces import as_score
from keepkv.score.base import Score
from keepkv.score.queries.expected import ExpectedAttention
from keepkv.score.queries.snapkv import SnapKV

# How SurfaceLogicKV's two behaviours are told apart, and the profile of each choice.
BEHAVIOURS = {
    "confusion": {"both": "inf", "surface": "precision", "logic": "recall"},
    "copy_vs_compose": {"both": "copy+compose", "surface": "copy", "logic": "compose"},
}


@register_method("adakv", paper="arXiv 2407.11550")
def adakv(
    score: str | Score = "snapkv", alpha: float = 0.2, sinks: int = 4, window: int = 32, when: When = When()
) -> Method:
    """Any score, with the budget of a layer shared by its heads: those with concentrated attention need fewer slots.

    Each head first keeps its own top ⌊``alpha`` · budget⌋, the rest goes to the highest scores over all heads.
    ``score`` is a name or a Score whose values can be compared between heads; "snapkv" looks through the method's
    ``window``. Memory of what a head does not keep is freed.

    Options:
        score: name or Score whose values can be compared between heads
        alpha: share of its budget that each head keeps for itself
        window: most recent tokens that are always kept; snapkv looks through them
    """
    return Method(as_score(score, window), AdaKV(alpha))


@register_method("surface-logic-kv", paper="arXiv 2508.15806")
def surface_logic_kv(
    score: str | Score = "snapkv", behaviour: str = "confusion", use: str = "both", beta: float = 1.351,
    eps_layer: float = 0.01, eps_head: float = 0.5, integration: str = "flat", layers: str = "sum", sinks: int = 4,
    window: int = 16, when: When = When(),
) -> Method:  # fmt: skip
    """Keeps more in layers and heads that were seen to memorise or to construct, by any score within them.

    Heads are profiled once per model, ``keepkv calibrate heads``: how they look at a needle while the model answers.
    c = b − ⌊b/beta⌋ + ε_H + pool·S'/ΣS', S' = S + ε_L·S/Σ of the layer, made exact: ``keepkv.allocate.HeadBudget``.

    A reconstruction: the paper's method section, settings and result tables were not found. This follows the code of
    what seems its predecessor (DiliLazyKV), without its faults: it reads scores in the order of a file, so that budgets
    are shuffled, and looks at the last prompt token alone. Its token choice, attention of the last 16 queries,
    max-pooled over 7, is the default here.

    Options:
        score: name or Score; snapkv looks through the method's window, max-pooled over 7
        behaviour: confusion: by precision and recall of the needle among what is attended most; copy_vs_compose: by
            attention to the token that is said, and to the needle where it does not have that token
        use: both, surface or logic: which behaviour counts
        beta: 1: all by the profile; the larger, the more evenly
        eps_layer: what a layer's share adds to its heads
        eps_head: slots that each head gets beside
        integration: flat, or two_level: first layers share, then the heads of each
        layers: sum or std of its heads is what a layer shares by, for two_level
    """
    if behaviour not in BEHAVIOURS:
        raise UnknownName("behaviour", behaviour, BEHAVIOURS)
    if use not in BEHAVIOURS[behaviour]:
        raise UnknownName("use", use, BEHAVIOURS[behaviour])
    share = HeadBudget(BEHAVIOURS[behaviour][use], beta, eps_layer, eps_head, integration, layers)
    return Method(_pooled(score, window), share)


@register_method("headkv", paper="arXiv 2410.19258")
def headkv(
    score: str | Score = "snapkv", profile: str = "found", beta: float = 1.2, sinks: int = 4, window: int = 16,
    when: When = When(),
) -> Method:  # fmt: skip
    """Keeps more in heads that find, in the text, what an answer needs, by any score within them.

    c = b − ⌊b/beta⌋ + N·⌊b/beta⌋·S/ΣS of N heads in all layers. S: attention to the needle among the k most attended
    tokens, mean over the steps of answers to questions that copy and that compose (HeadKV-R2), ``keepkv calibrate
    heads``. Its code looks at as many tokens as the needle has, and is run with ``beta`` from 1.005 to 10; the paper's
    needles are of one kind of reasoning, these of two.

    Options:
        score: name or Score; snapkv looks through the method's window, max-pooled over 7
        profile: found, or another one of the calibration: inf, precision, recall, copy, compose, area, full
        beta: 1: all by the profile; the larger, the more evenly
    """
    return Method(_pooled(score, window), HeadBudget(profile, beta, eps_layer=0.0, eps_head=0.0))


@register_method("duo-attention", paper="arXiv 2410.10819")
def duo_attention(
    profile: str = "full", score: str | Score = "streaming", sinks: int = 4, window: int = 32, when: When = When()
) -> Method:
    """Keeps everything in retrieval heads, sinks and window alone in streaming heads, as many as the budget holds.

    Heads retrieve in the order of a profile: DuoAttention's trained pattern, ``keepkv calibrate heads -o
    pattern=full_attention_heads.tsv``, or one of our own measures. The head between keeps what ``score`` says, the most
    recent by default. The paper names a share of the heads, and 64 or 128 sinks and 256 recent tokens; here it is the
    budget that says how many heads retrieve.

    Options:
        profile: full: the authors' pattern; or found, inf, copy, area …: measured by keepkv calibrate heads
        score: what the one head keeps that gets some of its tokens
    """
    return Method(as_score(score, window), RetrievalHeads(profile))


@register_method("simlayerkv", paper="arXiv 2410.13846")
def simlayerkv(score: str | Score = "tova", sinks: int = 4, window: int = 32, when: When = When()) -> Method:
    """Keeps everything in layers that need it, sinks and window alone in lazy ones, as many as the budget holds.

    A layer is the lazier the more of the last query's attention, mean over heads, goes to sinks and window. The paper
    has a threshold, 1,024 recent tokens, and as many lazy layers as pass it; here the budget says how many, and the
    layer between keeps what ``score`` says. kvpress counts attention of the last token to itself as not lazy; here that
    token is one of the window.

    Options:
        score: an attention, by which layers are judged too: tova is that of the last query
    """
    return Method(as_score(score, window), LazyLayers())


@register_method("per-layer")
def per_layer(
    shares: list[float] | tuple[float, ...] = (), score: str | Score = "snapkv", sinks: int = 4, window: int = 32,
    when: When = When(),
) -> Method:  # fmt: skip
    """Keeps in each layer the part of the budget that it is given, by any score within it.

    Layers share in proportion to ``shares``, whose scale does not matter: the mean over layers is the budget. kvpress'
    PerLayerCompressionPress has ratios instead, of which the budget is the mean.

    Options:
        shares: a number for each layer that is compressed, such as -o shares=[2,1,1,0.5]; none: uniform
        score: name or Score
    """
    return Method(as_score(score, window), PerLayer(tuple(shares), sinks + window))


@register_method("lukv", paper="arXiv 2602.08585")
def lukv(score: str | Score = "expected-attention", sinks: int = 4, window: int = 1, when: When = When()) -> Method:
    """Keeps in each layer and head the share that curves computed before say for the ratio, by any score within it.

    The curves are the authors', ``keepkv calibrate heads -o pattern=FILE.npy``: of one model and one score, and made
    with expected attention of ε = .02, which is the default here. What they optimise is not computed here.

    Options:
        score: the score that the curves were made for
    """
    made = ExpectedAttention(n_sink=sinks, epsilon=0.02) if score == "expected-attention" else as_score(score, window)
    return Method(made, Curves())


def _pooled(score: str | Score, window: int) -> Score:
    """A score by name; "snapkv" as HeadKV has it."""
    return SnapKV(max(1, window), 7, "max") if score == "snapkv" else as_score(score, window)
