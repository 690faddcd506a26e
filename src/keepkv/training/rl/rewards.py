"""Rewards by name: how good a reply is, in [0, 1].

A reward is what TRL calls one: a function of ``prompts``, ``completions``, ``completion_ids`` and the columns of the
data set (``answer``, ``item``) that returns a number per completion, or None where it cannot tell.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from keepkv.core.registry import known_as
from keepkv.errors import KeepKVError
from keepkv.tasks import grade
from keepkv.tasks.asking import Asked

Reward = Callable[..., "list[float | None]"]


def text_of(completion: Any) -> str:
    """The text of a completion: itself, or the last message's where it is a conversation."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def score(tokenizer: Any, asked: Sequence[Asked]) -> Reward:
    """The task's own scoring, by column ``item``: the place of the question in ``asked``."""
    if not asked:
        raise KeepKVError(
            "reward 'score' is a task's own scoring, and the data is a file of prompts and answers: give a task, or "
            "reward='exact', 'math-verify' or 'module:function'"
        )

    def score(completion_ids: Sequence[list[int]], item: Sequence[int], **others: Any) -> list[float | None]:
        said = ((asked[i], ids[: asked[i].limit]) for i, ids in zip(item, completion_ids, strict=True))
        return [grade(tokenizer, one.question, one.answer, ids).value for one, ids in said]

    return score


def exact(tokenizer: Any, asked: Sequence[Asked]) -> Reward:
    """1 where the reply is the answer, white space around both left out."""

    def exact(completions: Sequence[Any], answer: Sequence[str], **others: Any) -> list[float | None]:
        said = map(text_of, completions)
        return [float(one.strip() == right.strip()) for one, right in zip(said, answer, strict=True)]

    return exact


def math_verify(tokenizer: Any, asked: Sequence[Asked]) -> Reward:
    """1 where the reply's last formula or boxed text equals the answer, as the package math-verify compares them; a
    reply in which it finds none has 0, an answer in which it finds none counts for nothing."""
    if find_spec("math_verify") is None:
        raise KeepKVError("reward 'math-verify' needs the package math-verify: pip install math-verify")
    verifier: Any = importlib.import_module("math_verify")

    def math_verify(completions: Sequence[Any], answer: Sequence[str], **others: Any) -> list[float | None]:
        found: list[float | None] = []
        for reply, right in zip(map(text_of, completions), answer, strict=True):
            gold = verifier.parse(right) or verifier.parse(f"${right}$")
            found.append(float(verifier.verify(gold, verifier.parse(reply))) if gold else None)
        return found

    return math_verify


REWARDS: dict[str, Callable[[Any, Sequence[Asked]], Reward]] = {
    "score": score,
    "exact": exact,
    "math-verify": math_verify,
}


def reward(name: str, tokenizer: Any, asked: Sequence[Asked] = ()) -> Reward:
    """The reward of that name, or the function of ``module:function``, which is imported as Python does.

    asked: the questions that column ``item`` counts, for the task's own scoring. Raises ``UnknownName`` with the
    nearest name, ``KeepKVError`` where a module or function cannot be had.
    """
    module, colon, function = name.partition(":")
    if not colon:
        return REWARDS[known_as(name, [*REWARDS, "module:function"], "reward")](tokenizer, asked)
    try:
        found = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise KeepKVError(f"reward {name!r}: cannot import {module!r} ({error}). Put it on the Python path.") from error
    except AttributeError as error:
        raise KeepKVError(f"reward {name!r}: {module!r} has no {function!r}") from error
    if not callable(found):
        raise KeepKVError(f"reward {name!r} is {type(found).__name__}, not a function of completions")
    called: Reward = found
    return called
