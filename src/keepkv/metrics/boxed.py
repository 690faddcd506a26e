r"""Answers of mathematics: what the last ``\boxed{}`` of a reply holds, compared after normalising LaTeX.

The rules are those published with MATH (Hendrycks et al., arXiv 2103.03874, ``math_equivalence.py``); integers, as in
AIME, also compare as numbers, so that 025 is 25.
"""

from __future__ import annotations

import re


def boxed(reply: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` or ``\fbox{...}``; None without a complete one."""
    starts = [found.end() for found in re.finditer(r"\\(?:boxed|fbox)\s*\{", reply)]
    if not starts:
        return None
    depth = 1
    for i in range(starts[-1], len(reply)):
        depth += {"{": 1, "}": -1}.get(reply[i], 0)
        if not depth:
            return reply[starts[-1] : i]
    return None


def boxed_equals(reply: str, answer: str) -> float:
    """Whether the boxed answer is the true one."""
    said = boxed(reply)
    return float(said is not None and equal(said, answer))


def equal(a: str, b: str) -> bool:
    """Whether two answers are the same after normalising."""
    left, right = normalise(a), normalise(b)
    integers = [re.fullmatch(r"[+-]?\d+", text.replace(",", "")) for text in (left, right)]
    if all(integers):
        return int(left.replace(",", "")) == int(right.replace(",", ""))
    return left == right


def normalise(text: str) -> str:
    """LaTeX without what does not change the value: spacing, sizes, units, degrees, dollars; fractions in full."""
    text = text.strip().strip("$").replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    for old, new in (("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""), ("^{\\circ}", "")):
        text = text.replace(old, new)
    for mark in ("^\\circ", "\\$", "\\%", "%"):
        text = text.replace(mark, "")
    text = text.partition("\\text{ ")[0]  # a unit
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    text = re.sub(r"^\.", "0.", text)
    if text.count("=") == 1 and len(text.partition("=")[0]) <= 2:  # "k = "
        text = text.partition("=")[2]
    text = re.sub(r"\\sqrt(?!\{)(.)", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([^{])\{", r"\\frac{\1}{", text)
    if text == "0.5":
        return "\\frac{1}{2}"
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", text)
