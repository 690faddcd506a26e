"""keepkv's attention backend on CPUs."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from keepkv.integrations.vllm.backend import Building, Serving
from keepkv.integrations.vllm.manager import KeepKVSpec


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
