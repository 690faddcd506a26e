"""What vLLM calls in each of its processes, and how keepkv's backend takes the place of the stock one on CPUs."""

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


def replace_backend() -> None:
    """Take the place of the backend on CPUs, where vLLM lets nobody choose one, in this process from here on."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, "keepkv.integrations.vllm.cpu.KeepKVBackend")
    _choose_anew()


def restore_backend() -> None:
    """Give the place back to vLLM's own, for an engine without keepkv in the same process."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    AttentionBackendEnum.CPU_ATTN.clear_override()
    _choose_anew()


def _choose_anew() -> None:
    """vLLM remembers which backend it has chosen."""
    from vllm.v1.attention import selector

    selector._cached_get_attn_backend.cache_clear()
