"""keepkv's attention backend and worker on CPUs."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.worker.cpu_worker import CPUWorker

from keepkv.integrations.vllm.backend import Building, Serving
from keepkv.integrations.vllm.manager import KeepKVSpec
from keepkv.integrations.vllm.register import replace_backend
from keepkv.integrations.vllm.worker import Compressing


class KeepKVImpl(Serving, CPUAttentionBackendImpl):
    """Attention by vLLM's kernel, and by keepkv's where that cannot."""


class KeepKVBuilder(Building, CPUAttentionMetadataBuilder):
    """Metadata by vLLM's builder, from tables that begin with what is still read."""


class KeepKVBackend(CPUAttentionBackend):
    """vLLM's backend with these two, and room beside each slot."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> Any:
        return KeepKVImpl

    @staticmethod
    def get_builder_cls() -> Any:
        return KeepKVBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return KeepKVSpec.of(spec)


class KeepKVWorker(Compressing, CPUWorker):
    """The worker on CPUs, whose attention stores the keys of a head as columns."""

    transposed = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Here, not in every process: an engine with another worker keeps vLLM's own backend.
        replace_backend()
        super().__init__(*args, **kwargs)
