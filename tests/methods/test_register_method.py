"""A method is written once: its name, options, defaults and help come from the factory's signature."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace

import pytest
import zoo
from running import batch, generate, row

import keepkv
from keepkv.errors import KeepKVError, UnknownName
from keepkv.methods import METHODS, MethodInfo, make_method
from keepkv.methods.own.keepkv import keepkv as merging
from keepkv.score.content.knorm import KNorm


@pytest.fixture
def registered() -> Iterator[None]:
    before = dict(METHODS._factories)
    yield
    METHODS._factories = before


@pytest.mark.parametrize("info", keepkv.methods(), ids=lambda info: info.name)
def test_every_method_knows_its_name_and_all_its_options(info: MethodInfo) -> None:
    method = METHODS.build(info.name)
    assert (method.name, method.options, method.changed) == (info.name, info.options, {})
    assert {name: getattr(method, name) for name in ("sinks", "window", "when") if name in info.options} == {
        name: x for name, x in info.options.items() if name in ("sinks", "window", "when")
    }


def test_a_factory_called_directly_gives_what_the_registry_builds() -> None:
    when = keepkv.When(every=7)
    assert merging("zip", sinks=1, when=when) == METHODS.build("keepkv", key="zip", sinks=1, when=when)
    assert merging("zip", when=when).changed == {"key": "zip", "when": when}
    assert inspect.signature(merging).parameters["threshold"].default == 0.8
    assert (inspect.getdoc(merging) or "").startswith(keepkv.method_info("keepkv").doc)


def test_a_replaced_field_is_the_option_of_its_name() -> None:
    method = replace(METHODS.build("snapkv", window=8), window=6)
    assert method.options["window"] == 6 and method.changed == {"window": 6}


@pytest.mark.usefixtures("registered")
def test_options_named_as_fields_are_these_fields() -> None:
    @keepkv.register_method("mine")
    def mine(sinks: int = 1, window: int = 2, scale: float = 3.0) -> keepkv.Method:
        """Help."""
        return keepkv.Method(KNorm(), when=keepkv.When(every=5))

    method = METHODS.build("mine", scale=4.0)
    assert (method.sinks, method.window, method.when) == (1, 2, keepkv.When(every=5))
    assert method.options == {"sinks": 1, "window": 2, "scale": 4.0} and method.changed == {"scale": 4.0}
    with pytest.raises(KeepKVError, match="without a name"):
        keepkv.register_method("all")(lambda **options: keepkv.Method(KNorm()))


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(KeepKVError, match=r"'snapkv'.*windw.*Its options: window, kernel, pooling, sinks, when"):
        make_method("snapkv", {"windw": 4})
    with pytest.raises(KeepKVError, match=r"kernel=2 is not a whole number .* that is odd"):
        make_method("snapkv", {"kernel": 2})
    with pytest.raises(UnknownName, match="'snapkv'"):
        make_method("snapvk", {})
    with pytest.raises(KeepKVError, match="put them into the Method"):
        make_method(keepkv.Method(KNorm()), {"window": 4})


def test_the_receipt_names_the_options_that_differ() -> None:
    model = zoo.model("llama")
    cache = keepkv.Cache(model, "snapkv", 14, window=4, kernel=5, sinks=2)
    generate(model, row(batch(), 0), cache)
    assert cache.report().options == {"window": 4, "sinks": 2}


def test_a_method_where_a_score_is_due_is_told_so() -> None:
    with pytest.raises(KeepKVError, match="score='chunkkv' is a method, and a score is due"):
        METHODS.build("adakv", score="chunkkv")
