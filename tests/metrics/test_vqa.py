"""Metrics of benchmarks about pictures, at cases worked out by hand from what is published."""

from __future__ import annotations

from itertools import combinations
from statistics import mean

import pytest

from keepkv.metrics import vqa
from keepkv.metrics.mathvista import mathvista
from keepkv.metrics.mmmu import mmmu


def test_how_replies_are_compared() -> None:
    assert vqa.anls("Tota1 12", ["total 12"]) == 1 - 1 / 8 and vqa.anls("abcd", ["wxyz"]) == 0.0
    assert vqa.anls("ab", ["ax"]) == 0.0 and vqa.anls("abc", ["abx"]) == pytest.approx(2 / 3)
    assert vqa.relaxed("104", ["100"]) == 1.0 and vqa.relaxed("106", ["100"]) == 0.0
    assert vqa.relaxed("12%", ["0.12"]) == 1.0 and vqa.relaxed("Yes.", ["yes"]) == 1.0
    assert vqa.exact("Left.", ["left"]) == 1.0 and vqa.exact("on the left", ["left"]) == 0.0
    assert vqa.contains("the word is STOP here", ["stop"]) == 1.0 and vqa.contains("s t o p", ["stop"]) == 0.0
    assert vqa.contains("x ^ 2", ["x^2"], formula=True) == 1.0 and vqa.contains("X^2", ["x^2"], formula=True) == 0.0
    assert vqa.yes_or_no("Yes, it is", ["yes"]) == vqa.yes_or_no(" no.", ["No"]) == 1.0
    assert vqa.yes_or_no("It is, yes", ["yes"]) == 0.0


@pytest.mark.parametrize("same", range(11))
def test_consensus_is_the_mean_over_nine_of_ten(same: int) -> None:
    answers = ["red"] * same + ["blue"] * (10 - same)
    nines = [min(1.0, nine.count("red") / 3) for nine in combinations(answers, 9)]
    assert vqa.consensus("Red.", answers) == pytest.approx(mean(nines))


def test_consensus_compares_words() -> None:
    for said, answer in (
        ("the red car", "red car"), ("Two dogs", "2 dogs"), ("dont", "don't"), ("1,000", "1000"), ("a (b)", "b"),
        ("no-stop", "no stop"), ("3.5", "3.5"), ("U.S.", "us"),
    ):  # fmt: skip
        assert vqa.consensus(said, [answer]) == 1.0, said
    assert vqa.consensus("3.5", ["35"]) == vqa.consensus("one", ["2"]) == 0.0
    assert vqa.consensus("x", ["x", "y", "y"]) == 1 / 3


def test_the_letter_that_is_chosen() -> None:
    assert vqa.letter("B", ["B"]) == vqa.letter("b", ["B"]) == vqa.letter("It is (C).", ["C. cat"]) == 1.0
    assert vqa.letter("B. A cat", ["B"]) == vqa.letter("A cat, so the answer is B", ["B"]) == 1.0
    assert vqa.letter("a cat", ["A"]) == vqa.letter("A or B", ["A"]) == vqa.letter("", ["A"]) == 0.0
    assert vqa.letter("a dog", ["B"], options=["cat", "dog"]) == 1.0
    assert vqa.letter("cat or dog", ["B"], options=["cat", "dog"]) == 0.0
    assert vqa.letter("C", ["C"], options=["cat", "dog"]) == 0.0
    for said in ("B", "b.", "(B) x", "Option B", "The answer is B."):
        assert vqa.leading(said, ["B"]) == 1.0 and vqa.leading(said, ["A"]) == 0.0
    assert vqa.leading("It is B", ["B"]) == vqa.leading("", ["B"]) == 0.0
    assert vqa.letter_or_words("(B)", ["B"]) == vqa.letter_or_words("Downhill.", ["downhill"]) == 1.0
    assert vqa.letter_or_words("it goes downhill", ["downhill"]) == 0.0


def test_mmmu() -> None:
    options = ["cat", "dog", "the cow", "x"]
    for said, right in (
        ("(A) or (C)", "C"), ("A , no B it is", "B"), ("D.", "D"), ("(A) beats B", "A"),
        ("well I think that this is the cow", "C"),
    ):  # fmt: skip
        assert mmmu(said, [right], options) == 1.0, said
    assert mmmu("the dog", ["B"], options) == 0.0  # of five words or fewer a text is no choice
    for said, right in (
        ("The final answer is 3.456", "3.46"), ("so x = 1,234", "1234"), ("it could be a Red car", "red car"),
        ("Thus 12\nas I said", "12"), ("c", " c"),
    ):  # fmt: skip
        assert mmmu(said, [right]) == 1.0, said
    assert mmmu("cat", ["c"]) == mmmu("12", ["1"]) == mmmu("12 is less than 13", ["12"]) == 0.0


def test_mathvista() -> None:
    options = ["hong kong", "tokyo"]
    for said in ("B", "(B) tokyo", "tokio", "tokyo", "The answer is B."):
        assert mathvista(said, ["tokyo"], "multi_choice", options) == 1.0, said
        assert mathvista(said, ["hong kong"], "multi_choice", options) == 0.0, said
    assert mathvista("It is 14.", ["14"], "integer") == mathvista("14.9", ["14"], "integer") == 1.0
    assert mathvista("1.25 and 3.14159", ["3.14"], "float", precision=2) == 1.0
    assert mathvista("3", ["3.0"], "float", precision=1) == 1.0 and mathvista("many", ["3"], "integer") == 0.0
    assert mathvista("between [2007, 2008].", ["[2007, 2008]"], "list") == 1.0
    assert mathvista("Blue.", ["blue"]) == 1.0
