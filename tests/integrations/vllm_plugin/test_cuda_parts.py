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
        (builder, triton_attn.TritonAttentionMetadataBuilder, "get_cudagraph_support"),
        (impl, triton_attn.TritonAttentionImpl, "fused_output_quant_supported"),
        (cuda.KeepKVBackend, triton_attn.TritonAttentionBackend, "customize_spec"),
        (cuda.KeepKVGPUWorker, Worker, "execute_model"),
        (cuda.KeepKVGPUWorker, Worker, "get_kv_cache_spec"),
    ):
        known = list(inspect.signature(getattr(stock, method)).parameters)
        given = list(inspect.signature(getattr(mine, method)).parameters)
        named = [name for name in given if name not in ("args", "kwargs")]
        assert named == known[: len(named)], f"{method}: {given}, and vLLM has {known}"


def test_told_to_hold_all_in_graphs_vllm_holds_pieces(vllm_here: None) -> None:
    """By the function of vLLM that resolves what was asked for with what a backend supports."""
    from vllm.config import CompilationConfig, CUDAGraphMode
    from vllm.config.compilation import CompilationMode

    from keepkv.integrations.vllm import cuda

    builder = cuda.KeepKVBackend.get_builder_cls()
    asked = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode="FULL_AND_PIECEWISE")
    asked.set_splitting_ops_for_v1(all2all_backend="naive")
    support = builder.get_cudagraph_support(None, None)
    found = asked.resolve_cudagraph_mode_and_sizes(support, builder.__name__, 1, use_v2_model_runner=True)
    assert found == CUDAGraphMode.PIECEWISE
