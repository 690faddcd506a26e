"""One small checkpoint for all tests, and an engine a file; what needs vLLM is skipped where there is none."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

# Before vLLM is imported: the engine in this process, so that tests see its scheduler and its blocks.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

NEEDS_VLLM = "needs vLLM in this environment: make test-vllm"


@pytest.fixture(scope="session")
def vllm_here() -> None:
    found = find_spec("vllm")
    if found is None or found.origin is None:  # without an origin it is a folder of this name on the path
        pytest.skip(NEEDS_VLLM)


@pytest.fixture(scope="session")
def checkpoint(vllm_here: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    from vllm_engine import save_model

    return save_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="session")
def reference(checkpoint: str) -> Any:
    from vllm_engine import Reference

    return Reference(checkpoint)


@pytest.fixture(scope="module")
def engine(checkpoint: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """An engine with keepkv's worker; a file says more in ``ENGINE``."""
    from vllm_engine import Engine

    from keepkv.integrations.vllm import engine_args

    made = Engine(checkpoint, **{**engine_args(), **getattr(request.module, "ENGINE", {})})
    yield made
    made.close()
