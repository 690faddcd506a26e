"""What vLLM calls in each of its processes."""

from __future__ import annotations

from keepkv.integrations.vllm.versions import check_version


def register() -> None:
    """Name keepkv's attention backend for GPUs, which an engine uses only where it is asked to; on CPUs keepkv's worker
    does. May be called again."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    check_version()
    if not current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CUSTOM, "keepkv.integrations.vllm.cuda.KeepKVBackend")
