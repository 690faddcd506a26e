"""Names: as they are written, or the only one that differs in case; else the nearest is named."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

import keepkv
from keepkv.core.registry import Registry, known_as
from keepkv.errors import UnknownName
from keepkv.methods.pieces import as_score
from keepkv.score import SnapKV
from keepkv.store import choose


def test_case_does_not_matter_where_one_name_is_meant() -> None:
    assert known_as("KeepKV", ["keepkv", "snapkv"], "method") == "keepkv"
    assert known_as("keepkv", ["keepkv", "KeepKV"], "method") == "keepkv"
    with pytest.raises(UnknownName, match=r"method 'KEEPKV'\. Did you mean"):
        known_as("KEEPKV", ["keepkv", "KeepKV"], "method")
    with pytest.raises(UnknownName, match=r"method 'SNAPVK'\. Did you mean 'SnapKV'"):
        known_as("SNAPVK", ["keepkv", "SnapKV"], "method")
    with pytest.raises(UnknownName, match="unknown method '3'"):
        known_as(3, ["keepkv"], "method")  # type: ignore[arg-type]


def test_registries_build_by_either_case() -> None:
    pieces: Registry[Any] = Registry("piece")
    pieces.register("Fox")(Fraction)
    assert pieces.build("fox", numerator=3) == 3 and pieces.named("FOX") == "Fox"
    assert "fox" not in pieces  # what is in it, is in it by its own name


def test_everything_that_is_made_by_name() -> None:
    assert keepkv.method_info("KeepKV").name == "keepkv"
    assert as_score("SnapKV", 7) == SnapKV(window=7)
    assert choose("Ragged", "INT8", False) == ("ragged", "int8")
    assert choose("Flat", "None", True) == ("ragged", "none")
    with pytest.raises(UnknownName, match=r"store 'ragd'\. Did you mean 'ragged'"):
        choose("ragd", "none", True)
