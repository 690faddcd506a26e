"""Shared set-up: one thread per worker, no network, quiet transformers."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers

if not torch.cuda.is_available():  # kernels run in Triton's interpreter, which must know before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

BEFORE = pytest.StashKey[set[str]]()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEFORE] = _visible(config)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run whose tests left files in the repository's root: a later run would read them."""
    left = _visible(session.config) - session.config.stash[BEFORE]
    if left and not hasattr(session.config, "workerinput"):
        print(f"\nERROR: tests left {', '.join(sorted(left))} in {session.config.rootpath}; they write to tmp_path.")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _visible(config: pytest.Config) -> set[str]:
    return {path.name for path in config.rootpath.iterdir() if not path.name.startswith((".", "__"))}
