"""What differs between versions of transformers is known, and a version that nobody tried is said aloud."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
import zoo
from packaging.version import Version
from snippets import as_installed
from transformers import DynamicCache

import keepkv
from keepkv.engine import versions
from keepkv.engine.versions import CACHE, cache_of

SOURCE = Path(keepkv.__file__).parent


def test_forwards_and_outputs_name_the_cache_as_we_do() -> None:
    model = zoo.model("llama")
    past = DynamicCache(config=model.config)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")  # the former name warns
        assert cache_of(model(torch.tensor([[5, 6, 7]]), **{CACHE: past})) is past


def test_nothing_else_asks_for_a_version() -> None:
    """A second place would be missed when the next release renames something."""
    asking = re.compile(r"packaging\.version|past_key_values=")
    found = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if asking.search(path.read_text())}
    # The worker runs where kvpress does, and the plugin asks for vLLM's.
    assert found == {"engine/versions.py", "bench/kvpress_worker.py", "integrations/vllm/versions.py"}


def test_a_newer_version_warns_once_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    versions.warn_if_untested.cache_clear()
    monkeypatch.setattr(versions, "NEWEST", {"transformers": Version("5.1"), "torch": Version("99")})
    with pytest.warns(UserWarning, match=r"tested up to transformers 5\.1; .* pip install 'transformers==5\.1'\.$"):
        keepkv.Cache(zoo.model("llama"), "full")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keepkv.Cache(zoo.model("llama"), "full")
    versions.warn_if_untested.cache_clear()


def test_patch_releases_of_a_tested_version_do_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"transformers": Version("5.24.3"), "torch": Version("2.13.1")}
    monkeypatch.setattr(versions, "installed", lambda: here)
    monkeypatch.setattr(versions, "NEWEST", {"transformers": Version("5.24.0"), "torch": Version("2.13.0")})
    assert versions.untested() is None


def test_pages_are_run_with_the_installed_name() -> None:
    assert as_installed("model(**x, cache=kv.copy(), n=1)") == f"model(**x, {CACHE}=kv.copy(), n=1)"
