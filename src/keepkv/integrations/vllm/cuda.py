"""keepkv's attention backend and worker on GPUs. By vLLM's source: it was never run on one.

Rows that the stock kernel cannot read attend in keepkv's own attention over gathered slots, which no CUDA graph holds:
the engine is eager, or has graphs of what lies between two attentions, as ``engine_args`` has it. Blocks may lie slot
by slot or head by head: ``Pool`` goes by strides.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.worker.gpu_worker import Worker

from keepkv.integrations.vllm.backend import Building, Serving
from keepkv.integrations.vllm.manager import KeepKVSpec
from keepkv.integrations.vllm.worker import Compressing


class KeepKVImpl(Serving, TritonAttentionImpl):
    """Attention by vLLM's kernel, and by keepkv's where that cannot."""

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """No: rows that keepkv serves are written as they are."""
        return False


class KeepKVBuilder(Building, TritonAttentionMetadataBuilder):
    """Metadata by vLLM's builder, from tables that begin with what is still read."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """No graph holds this attention: vLLM takes "PIECEWISE" where it was told to hold all."""
        return AttentionCGSupport.NEVER


class KeepKVBackend(TritonAttentionBackend):
    """vLLM's backend with these two, and room beside each slot."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        return KeepKVImpl

    @staticmethod
    def get_builder_cls() -> Any:
        return KeepKVBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return KeepKVSpec.of(super().customize_spec(spec))


class KeepKVGPUWorker(Compressing, Worker):
    """The worker on GPUs, whose attention stores the key of a slot and its value side by side."""
