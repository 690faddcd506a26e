"""Colours and marks: who cannot tell two colours apart can tell two methods apart."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from keepkv.report.style import DARK, LIGHT, MOST, NEUTRAL, OF_BASELINES, OTHERS, SERIES, palette, styles

# What is left of linear red, green and blue without one kind of cone (Machado et al. 2009, severity 1).
SEEN = {
    "all cones": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# Linear red, green and blue to cones, and their cube roots to Oklab (Ottosson 2020).
CONES = [
    [0.41222147, 0.53633254, 0.05144599],
    [0.21190350, 0.68069955, 0.10739696],
    [0.08830246, 0.28171884, 0.62997870],
]
OKLAB = [
    [0.21045426, 0.79361779, -0.00407205],
    [1.97799850, -2.42859221, 0.45059371],
    [0.02590404, 0.78277177, -0.80867577],
]


def linear(colour: str) -> torch.Tensor:
    parts = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], dtype=torch.float64)
    return torch.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def oklab(colour: str, kind: str) -> torch.Tensor:
    seen, cones, lab = (torch.tensor(one, dtype=torch.float64) for one in (SEEN[kind], CONES, OKLAB))
    return lab @ (cones @ (seen @ linear(colour)).clamp(0, 1)).clamp(0) ** (1 / 3)


def contrast(first: str, second: str) -> float:
    weights = torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    light, dark = sorted((float(weights @ linear(one)) for one in (first, second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("kind", SEEN)
@pytest.mark.parametrize(("scheme", "colours"), [("light", LIGHT), ("dark", DARK)])
def test_colours_stay_apart(scheme: str, colours: tuple[str, ...], kind: str) -> None:
    """In Oklab 0.02 is just seen; orange and gold, #dd5f1b and #b98900, come to 0.02 under deuteranopia."""
    drawn = [*colours, NEUTRAL[scheme]["ink"], NEUTRAL[scheme]["grey"]]
    far = {pair: float((oklab(pair[0], kind) - oklab(pair[1], kind)).norm()) for pair in combinations(drawn, 2)}
    assert min(far.values()) >= 0.09, min(far, key=lambda pair: far[pair])


@pytest.mark.parametrize(("scheme", "colours"), [("light", LIGHT), ("dark", DARK)])
def test_colours_stand_out_from_the_paper(scheme: str, colours: tuple[str, ...]) -> None:
    """Graphics need 3 to 1 (WCAG 2.2, 1.4.11)."""
    paper = NEUTRAL[scheme]["bg"]
    assert min(contrast(one, paper) for one in (*colours, NEUTRAL[scheme]["grey"])) >= 3


def test_no_two_methods_differ_by_colour_alone() -> None:
    found = styles([f"method-{i}" for i in range(MOST)], [f"other-{i}" for i in range(MOST)])
    assert len({(one.mark, one.hollow) for one in (*SERIES, *OF_BASELINES.values())}) == 10
    assert len({one.colour for one in SERIES} & {one.colour for one in (*OTHERS, *OF_BASELINES.values())}) == 0
    assert len({(one.mark, one.dash, one.hollow) for one in found.values()}) == len(found) == 2 * MOST + 3
    assert {one.name for one in found.values()} == {"ink", "grey", *(f"s{i}" for i in range(MOST))}


def test_what_has_no_colour_left_is_grey() -> None:
    found = styles([f"method-{i}" for i in range(MOST + 2)], ["other"])
    assert [found[f"method-{i}"].name for i in (MOST - 1, MOST, MOST + 1)] == ["s6", "grey", "grey"]
    assert found["other"].hollow and found["full"].name == "ink"


def test_palette_has_every_colour_of_both_schemes() -> None:
    light, _, dark = palette().partition("@media")
    assert all(f"--s{i}:{colour}" in light for i, colour in enumerate(LIGHT))
    assert all(f"--s{i}:{colour}" in dark for i, colour in enumerate(DARK))
    assert "screen" in dark  # paper is white
