"""The classes for GPUs, as far as they can be looked at without one: they fit the classes of vLLM that they extend."""

import inspect


def test_they_extend_what_vllm_calls(vllm_here: None) -> None:
    from vllm.v1.attention.backends import triton_attn
    from vllm.v1.worker.gpu_worker import Worker

    from keepkv.integrations.vllm import cuda

    assert issubclass(cuda.KeepKVBackend, triton_attn.TritonAttentionBackend)
    assert issubclass(cuda.KeepKVGPUWorker, Worker) and not cuda.KeepKVGPUWorker.transposed
    impl, builder = cuda.KeepKVBackend.get_impl_cls(), cuda.KeepKVBackend.get_builder_cls()
    assert issubclass(impl, triton_attn.TritonAttentionImpl)
    assert issubclass(builder, triton_attn.TritonAttentionMetadataBuilder)
    assert cuda.KeepKVBackend.get_name() == "CUSTOM"
    for mine, stock, method in (
        (impl, triton_attn.TritonAttentionImpl, "forward"),
        (builder, triton_attn.TritonAttentionMetadataBuilder, "build"),
        (impl, triton_attn.TritonAttentionImpl, "fused_output_quant_supported"),
        (cuda.KeepKVBackend, triton_attn.TritonAttentionBackend, "customize_spec"),
        (cuda.KeepKVGPUWorker, Worker, "execute_model"),
        (cuda.KeepKVGPUWorker, Worker, "get_kv_cache_spec"),
    ):
        known = list(inspect.signature(getattr(stock, method)).parameters)
        given = list(inspect.signature(getattr(mine, method)).parameters)
        named = [name for name in given if name not in ("args", "kwargs")]
        assert named == known[: len(named)], f"{method}: {given}, and vLLM has {known}"
