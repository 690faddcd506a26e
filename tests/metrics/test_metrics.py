"""Metrics against their definitions, written out naively in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch

from keepkv.measure import bootstrap, share, wilson
from keepkv.metrics import (
    casefolded,
    common_prefix,
    kl,
    overall_loyalty,
    relative_error,
    same_answer,
    top1_agreement,
)


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(powers) for x in powers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kl_is_its_definition(dtype: torch.dtype) -> None:
    a, b = (torch.randn(2, 70, 9) * 4).to(dtype), (torch.randn(2, 70, 9) * 4).to(dtype)  # more rows than one block
    found = kl(a, b)
    for i, j in ((0, 0), (0, 63), (0, 64), (1, 69)):
        p, q = softmax(a[i, j].tolist()), softmax(b[i, j].tolist())
        assert float(found[i, j]) == pytest.approx(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
    assert found.shape == (2, 70) and bool((found > 0).all())
    assert not torch.allclose(found, kl(b, a))


def test_kl_is_zero_for_equal_distributions_and_bounded_below() -> None:
    logits = torch.randn(5, 100) * 200
    assert kl(logits, logits).tolist() == [0.0] * 5
    assert float(kl(logits, logits + 3.0).max()) < 1e-4  # shifted logits are the same distribution, up to float32
    assert bool((kl(logits, logits * (1 + 1e-7)) >= 0).all())


def test_kl_with_excluded_tokens() -> None:
    never = float("-inf")
    p, q = torch.tensor([0.0, 0.0, never]), torch.tensor([0.0, 0.0, 0.0])
    assert float(kl(p, p)) == 0.0
    assert float(kl(p, q)) == pytest.approx(math.log(3 / 2))
    assert float(kl(q, p)) == math.inf


def test_top1_agreement() -> None:
    a = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
    b = torch.tensor([[-1.0, 9.0, 8.0], [1.0, 2.0, 1.0]])
    assert top1_agreement(a, b).tolist() == [True, False]


def test_relative_error_is_its_definition() -> None:
    o, other = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)
    found = relative_error(o, other)
    x, y = o[1, 2, 3].tolist(), other[1, 2, 3].tolist()
    expected = math.sqrt(sum((b - a) ** 2 for a, b in zip(x, y, strict=True))) / math.sqrt(sum(a * a for a in x))
    assert float(found[1, 2, 3]) == pytest.approx(expected)
    assert float(relative_error(o, 1.5 * o).mean()) == pytest.approx(0.5)
    assert float(relative_error(torch.zeros(3), torch.zeros(3))) == 0.0


@pytest.mark.parametrize(
    ("reference", "other", "expected"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 5, 3], 1), ([1, 2], [1, 2, 3], 2), ([1], [2], 0), ([], [], 0)],
)
def test_common_prefix(reference: list[int], other: list[int], expected: int) -> None:
    assert common_prefix(reference, other) == expected


def test_bootstrap_is_seeded_and_covers() -> None:
    draw = random.Random(0)
    values = [draw.gauss(3.0, 1.0) for _ in range(40)]
    found = bootstrap(values, seed=1)
    assert found == bootstrap(values, seed=1) != bootstrap(values, seed=2)
    assert found.mean == pytest.approx(sum(values) / 40) and found.values == tuple(values)
    spread = math.sqrt(sum((x - found.mean) ** 2 for x in values) / 40 / 40)
    assert found.low == pytest.approx(found.mean - 1.96 * spread, abs=0.15 * spread)
    assert found.high == pytest.approx(found.mean + 1.96 * spread, abs=0.15 * spread)


def test_bootstrap_equals_resampling_written_out() -> None:
    values = [0.0, 1.0, 5.0]
    drawn = torch.randint(3, (2000, 3), generator=torch.Generator().manual_seed(7)).tolist()
    means = sorted(sum(values[i] for i in sample) / 3 for sample in drawn)
    found = bootstrap(values, seed=7)
    assert (found.low, found.high) == (pytest.approx(means[50]), pytest.approx(means[1949]))


def test_one_value_has_no_interval() -> None:
    found = bootstrap([2.5])
    assert (found.mean, found.low, found.high) == (2.5, None, None)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])


def test_wilson_solves_its_equation() -> None:
    for right, total in ((3, 10), (1, 40), (39, 40)):
        for bound in wilson(right, total):
            assert abs(right / total - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / total))
    assert wilson(0, 5)[0] == 0.0 and wilson(5, 5)[1] == 1.0
    assert share([True, False]).mean == 0.5 and share([True] * 8).low == pytest.approx(0.6756, abs=1e-4)


def test_loyalty_is_the_mean_over_groups() -> None:
    found = overall_loyalty({"short": [True, False], "long": [True] * 8})
    assert (found.macro, found.micro, found.n) == (75.0, 90.0, 10)
    assert found.low < 90.0 < found.high
    assert overall_loyalty({"same": [True] * 3}).macro == 100.0
    with pytest.raises(ValueError, match="none in"):
        overall_loyalty({"a": [True], "b": []})


def test_loyalty_depends_on_what_counts_as_the_same() -> None:
    assert not same_answer("Paris", " paris\n")
    assert same_answer("Paris", " paris\n", casefolded)


def test_accuracy_changes_by_no_more_than_one_minus_loyalty() -> None:
    draw = random.Random(0)
    for _ in range(200):
        labels, full, other = ([draw.choice("abc") for _ in range(12)] for _ in range(3))
        right = [sum(a == b for a, b in zip(labels, found, strict=True)) / 12 for found in (full, other)]
        loyalty = overall_loyalty({"all": [same_answer(a, b) for a, b in zip(full, other, strict=True)]})
        assert abs(right[0] - right[1]) <= 1 - loyalty.macro / 100 + 1e-12
