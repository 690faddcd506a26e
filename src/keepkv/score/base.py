"""The score: how much will each slot matter?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from keepkv.core.options import Checked
from keepkv.core.registry import Registry, owner
from keepkv.core.slots import LayerView
from keepkv.core.stats import Stat
from keepkv.errors import KeepKVError

SCORES: Registry[Score]
WORTH = "worth"  # (B,T) in ``view.state``: how much the outcome of a second reading hangs on each of its queries


class Score(Checked):
    """Base of scores: subclass, set what you need, and implement ``__call__``. Subclasses are frozen dataclasses.

    A score is stateless: what it must remember between forwards lives in ``view.slots.stats`` (per slot, declared in
    ``stats``) and in ``view.state`` (per row), both owned by the cache. A statistic that changes when slots are
    compressed is left by ``__call__`` in ``view.memo`` under its own name: the engine stores it, for the rows that are
    compressed.
    """

    stats: ClassVar[dict[str, Stat]] = {}  # what is kept per slot, by name
    needs_rope: ClassVar[bool] = False  # True if it must undo RoPE: refused where the rotary layout is unknown
    needs_output: ClassVar[bool] = False  # True if ``__call__`` looks at ``view.output``: refused where it is not known
    observes: ClassVar[bool] = False  # True if ``observe`` must be called after each forward
    follows_decode: ClassVar[bool] = False  # True if ``observe`` uses the attention of each decoded token
    needs_second_reading: ClassVar[bool] = False  # True if ``observe`` must see the text read again: ``keepkv.reread``
    needs_gradients: ClassVar[bool] = False  # True if that reading must say how much each query matters, in ``WORTH``
    needs_questions: ClassVar[bool] = False  # True if it needs queries of questions to come: ``keepkv.rehearse``
    needs_hidden: ClassVar[bool] = False  # True if ``token_stats``, or ``observe`` in ``view.hidden``, reads them
    needs_calibration: ClassVar[str | None] = None  # the kind of calibration that it reads from ``view.calibration``
    tells_density: ClassVar[bool] = False  # True if ``density`` says how dense the attention of a layer is
    signed: ClassVar[bool] = False  # True if scores may be below 0: refused where they are multiplied
    scores_within_spans: ClassVar[bool] = False  # True if ``span_scores`` ignores queries from outside the span
    span_stats: ClassVar[dict[str, Stat]] = {}  # further ``stats`` that ``span_scores`` needs

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, declared in vars(cls).items():
            if name in ("stats", "span_stats") and isinstance(declared, dict):
                for stat, kind in declared.items():
                    if not isinstance(kind, Stat):
                        raise KeepKVError(
                            f"{cls.__name__}.{name}[{stat!r}] is {kind!r}: give a keepkv.Stat(start, merge), such as "
                            f"keepkv.Stat(0.0, 'sum')"
                        )

    @property
    def looks_again(self) -> bool:
        """Whether it needs more of a text than one reading: see ``engine.passes``."""
        return self.needs_second_reading or self.needs_questions

    @property
    def remembers(self) -> dict[str, int]:
        """How many queries of each row ``observe`` keeps under each name of ``view.state``; a file that holds another
        number is refused. Names that are not given are not compared."""
        return {}

    def token_stats(self, hidden: Tensor, calibration: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Statistics (B,H,T) float32 of new tokens, by name, from ``hidden`` (B,T,E): what the attention module was
        fed. Asked for before every token is stored, where ``needs_hidden``; padding does not matter."""
        return {}

    def observe(self, view: LayerView) -> None:
        """Called after each forward that may be followed by a compression; modifies ``view.slots.stats`` in place
        and sets entries of ``view.state``. Padded queries (position ``EMPTY``) must leave no trace. An entry of
        ``view.state`` that a row has not set yet holds zeros, ``EMPTY`` where it is an integer."""

    def __call__(self, view: LayerView) -> Tensor:
        """(B,H,S) float32, larger = keep. Values at empty slots are ignored. May set entries of ``view.memo``: new
        values of its statistics, or what ``masses`` and ``span_scores`` reuse. Leaves the rest of the view as it is."""
        raise TypeError(f"{type(self).__name__} must implement __call__(view) -> scores")

    def density(self, view: LayerView) -> Tensor:
        """(B,) float64 in [0, 1]: share of the attention that matters, where ``tells_density``."""
        raise TypeError(f"{type(self).__name__} tells no density")

    def masses(self, view: LayerView) -> Tensor | None:
        """ln of the mean attention (B,H,S) that each slot will receive, for merges, where the score predicts it."""
        return None

    def observe_spans(self, view: LayerView) -> None:
        """Called after ``observe`` where ``view.spans`` is given: remember what ``span_scores`` needs. Entries of
        ``view.state`` whose names start with ``span_`` are kept for later turns."""

    def span_scores(self, view: LayerView, own: Tensor) -> Tensor:
        """(B,H,S) float32: scores that are compared within each interval of ``view.spans``, and outside of all. ``own``
        (B,H,S) is what ``__call__`` returned: right as it is for scores that no query has a say in."""
        return own


@dataclass(frozen=True)
class Wrapped(Score):
    """Base of scores that add something to another: what it keeps, needs, observes and predicts.

    passed_on: attributes of the other's; ``ALL_OF_IT`` for a score that looks at nothing itself.
    """

    score: Score

    observes: ClassVar[bool] = True

    passed_on: ClassVar[tuple[str, ...]] = (  # attributes of the other's
        "stats", "needs_rope", "needs_output", "needs_hidden", "needs_calibration", "tells_density",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.passed_on:
            object.__setattr__(self, name, getattr(self.score, name))
        object.__setattr__(self, "signed", type(self).signed or self.score.signed)

    @property
    def remembers(self) -> dict[str, int]:
        return self.score.remembers

    def token_stats(self, hidden: Tensor, calibration: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        return self.score.token_stats(hidden, calibration)

    def observe(self, view: LayerView) -> None:
        if self.score.observes:
            self.score.observe(view)

    def masses(self, view: LayerView) -> Tensor | None:
        return self.score.masses(view)

    def density(self, view: LayerView) -> Tensor:
        return self.score.density(view)


ALL_OF_IT = (*Wrapped.passed_on, "observes", "follows_decode", "needs_second_reading", "needs_questions")


@dataclass(frozen=True)
class FunctionScore(Score):
    """A plain function ``view -> scores`` as a score."""

    function: Callable[[LayerView], Tensor]

    def __call__(self, view: LayerView) -> Tensor:
        return self.function(view)


SCORES = Registry("score")


def register_score(name: str, *, replace: bool = False) -> Callable[[Any], Any]:
    """Register a ``Score`` subclass, or a plain function ``view -> (B,H,S) scores``, under ``name``.

    Registering the same definition again takes its former place; ``replace`` takes that of another one.

    >>> @register_score("value-norm")
    ... def value_norm(view):
    ...     return view.slots.values.float().norm(dim=-1)
    """

    def enter(piece: Any) -> Any:
        if isinstance(piece, type):
            return SCORES.register(name, replace=replace)(piece)

        def build() -> FunctionScore:
            return FunctionScore(piece)

        build.__module__, _, build.__qualname__ = owner(piece).rpartition(".")
        SCORES.register(name, replace=replace)(build)
        return piece

    return enter


def name_of(score: Score) -> str:
    """What ``score`` is called: the name that it is registered under, or that of its class or function."""
    made = score.function if isinstance(score, FunctionScore) else type(score)
    return SCORES.name_of(made) or owner(made).rpartition(".")[2]
