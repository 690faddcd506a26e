"""What is said of a method is what its pieces do."""

from __future__ import annotations

import pytest

import keepkv
from keepkv.methods import METHODS, method_info


def test_every_method_belongs_to_a_family() -> None:
    groups = {info.group for info in keepkv.methods() if not info.name.startswith("test-")}
    assert all(group.endswith(".") for group in groups) and "Yours." not in groups
    assert method_info("keepkv2").group == method_info("keepkv").group != method_info("snapkv").group


@pytest.mark.parametrize("name", list(METHODS))
def test_needs_are_those_of_the_pieces(name: str) -> None:
    method, said = METHODS.build(name), " ".join(method_info(name).needs)
    assert ("second reading" in said) == method.score.needs_second_reading
    asks = method.score.needs_calibration or method.allocate.needs_calibration
    assert ("keepkv calibrate" in said) == (asks is not None)
    assert ("rotary" in said) == method.score.needs_rope
    assert ("MLA" in said) == method.reduce.merges


def test_what_methods_do() -> None:
    assert method_info("snapkv").does == ["looks at queries"]
    assert method_info("knorm").does == ["looks at no query"]
    assert "gives each head a budget of its own" in method_info("adakv").does
    assert "compresses every 128 decoded tokens" in method_info("g-kv").does
    assert "keeps 4 bytes beside each slot" in method_info("h2o").does


def test_yours_are_yours() -> None:
    @keepkv.register_method("test-yours")
    def yours(size: int) -> keepkv.Method:
        """Keeps nothing of note."""
        return METHODS.build("random")

    try:
        info = method_info("test-yours")  # nothing is known of it without a size
        assert info.group == "Yours." and info.needs == info.does == []
    finally:
        del METHODS._factories["test-yours"]
