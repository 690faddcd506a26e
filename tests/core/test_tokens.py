"""Facts of tokens, kept as runs, against a list of every token's."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keepkv.core.tokens import IMAGE, TEXT, VIDEO, Coming, Tokens

Fact = list[int]  # rotary positions, kind, step, cell


def naive(before: list[Fact], kinds: list[int], places: list[list[int]], starts: list[bool]) -> list[Fact]:
    """Facts of each further token of one row, one by one."""
    facts = list(before)
    for kind, place, start in zip(kinds, places, starts, strict=True):
        last = facts[-1] if facts else [-1] * len(place) + [TEXT, -1, -1]
        step, cell = last[-2], -1
        if kind != TEXT:
            moved = len(place) > 1 and place[0] != last[0]
            fresh = kind != last[-3] or moved or start
            step, cell = step + fresh, 0 if fresh else last[-1] + 1
        facts.append([*place, kind, step, cell])
    return facts[len(before) :]


@st.composite
def forwards(draw: st.DrawFn) -> tuple[int, list[tuple[list[int], list[list[int]], list[bool]]]]:
    axes, made, at = draw(st.sampled_from([1, 3])), [], 0
    for _ in range(draw(st.integers(1, 4))):
        kinds: list[int] = []
        places: list[list[int]] = []
        for _ in range(draw(st.integers(1, 3))):
            kind, size = draw(st.sampled_from([TEXT, IMAGE, VIDEO])), draw(st.integers(1, 5))
            kinds += [kind] * size
            if axes == 1 or kind == TEXT:
                places += [[at + i] * axes for i in range(size)]
                at += size
            else:
                places += [[at + i // 4, at + i // 2, at + i % 2] for i in range(size)]
                at += draw(st.integers(1, 6))
        made.append((kinds, places, draw(st.lists(st.booleans(), min_size=len(kinds), max_size=len(kinds)))))
    return axes, made


def columns(x: list[list[int]], size: int, blank: list[int]) -> list[list[int]]:
    return [blank] * (size - len(x)) + x


@given(forwards(), forwards())
@settings(max_examples=60, deadline=None)
def test_runs_tell_what_a_list_of_all_tokens_does(one: tuple, two: tuple) -> None:  # type: ignore[type-arg]
    """Two rows of different lengths, padded on the left; cut, picked, joined, and pruned to what is held."""
    axes = one[0]
    two = (axes, [(k, [p[:axes] if len(p) >= axes else p * axes for p in ps], s) for k, ps, s in two[1]])
    tokens, rows, seen = Tokens.text(2, axes), [[], []], [0, 0]  # type: ignore[var-annotated]
    for i in range(max(len(one[1]), len(two[1]))):
        parts = [x[1][i] if i < len(x[1]) else ([], [], []) for x in (one, two)]
        size = max(len(kinds) for kinds, _, _ in parts)
        positions = torch.full((2, size), -1)
        kinds, starts = torch.zeros(2, size, dtype=torch.int64), torch.zeros(2, size, dtype=torch.bool)
        places = torch.zeros(2, size, axes, dtype=torch.int64)
        for row, (k, p, s) in enumerate(parts):
            n = len(k)
            if n:
                positions[row, -n:] = torch.arange(seen[row], seen[row] + n)
                kinds[row, -n:], starts[row, -n:], places[row, -n:] = torch.tensor(k), torch.tensor(s), torch.tensor(p)
            rows[row] += naive(rows[row], k, p, s)
            seen[row] += n
        tokens = tokens.extended(positions, Coming(places, kinds, starts))
    check(tokens, rows)
    check(tokens.rows(torch.tensor([1, 0, 1])), [rows[1], rows[0], rows[1]])
    check(tokens.joined(tokens.rows(torch.tensor([1]))), [*rows, rows[1]])
    left = [len(row) // 2 for row in rows]
    check(tokens.before(torch.tensor(left)), [row[:n] for row, n in zip(rows, left, strict=True)])
    held = torch.stack([torch.arange(0, 30, 3).clamp(max=len(row) - 1) for row in rows])
    fewer = tokens.kept(held)
    assert torch.equal(fewer.of(held), tokens.of(held)) and fewer.at.shape[1] <= tokens.at.shape[1]
    next_ = torch.tensor([[len(row)] for row in rows])
    assert torch.equal(fewer.of(next_), tokens.of(next_))


def check(tokens: Tokens, rows: list[list[Fact]]) -> None:
    for row, facts in enumerate(rows):
        positions = torch.arange(len(facts)).expand(len(tokens.at), -1)
        found: Tensor = tokens.of(positions)[row]
        assert found.tolist() == facts


def test_text_is_one_run_however_long() -> None:
    tokens = Tokens.text(1, 3)
    for start in range(0, 60, 20):
        at = torch.arange(start, start + 20)[None]
        tokens = tokens.extended(at, Coming(places=at[..., None].expand(1, 20, 3)))
    assert tokens.at.shape == (1, 1) and tokens.places(torch.tensor([[59]])).tolist() == [[[59, 59, 59]]]
