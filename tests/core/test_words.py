"""Numbers in words."""

from __future__ import annotations

import pytest

from keepkv.core.budget import Budget
from keepkv.core.words import counted, percent, size, spread


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"), (1, "1 B"), (999, "999 B"), (10_000_000, "9.54 MiB"), (256 << 20, "256 MiB"), (1 << 30, "1 GiB"),
        (1536 << 20, "1.5 GiB"), (139_424, "136 KiB"), (1_700_000, "1.62 MiB"), (5 << 40, "5,120 GiB"),
    ],
)  # fmt: skip
def test_sizes(count: int, said: str) -> None:
    assert size(count) == said


def test_shares_spreads_and_counts() -> None:
    assert [percent(x) for x in (1.0, 0.1, 0.125, 0.01234, 0.9999)] == ["100%", "10%", "12.5%", "1.23%", "100%"]
    assert spread([94.0, 94.0]) == "94" and spread([101.2, 90.04]) == "90 to 101"
    assert counted(1, "token") == "1 token" and counted(1856, "slot") == "1,856 slots"


def test_budgets() -> None:
    given = (0.1, "25%", 64, "10000000B", "256MiB", "1700001B", "7B")
    assert [str(Budget.of(x)) for x in given] == [
        "10% of the tokens", "25% of the tokens", "64 slots per head", "10 MB", "256 MiB", "1.62 MiB", "7 B",
    ]  # fmt: skip
