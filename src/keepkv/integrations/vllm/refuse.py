"""What an engine cannot do beside compression: found in its configuration at start. Knows no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from keepkv.errors import KeepKVError

_OURS = "keepkv.integrations.vllm."


def _at(config: Any, path: str) -> Any:
    """The value at a dotted ``path`` of a configuration, None where it has none."""
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def _more_than_one(path: str) -> Callable[[Any], bool]:
    return lambda config: (_at(config, path) or 1) > 1


def _given(path: str) -> Callable[[Any], bool]:
    return lambda config: bool(_at(config, path))


_RULES: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (_given("speculative_config"), "speculative decoding",
     "a rejected token could undo a compression; start without --speculative-config"),
    (_given("kv_transfer_config"), "a KV connector",
     "it stores blocks by position, and kept slots are moved; start without --kv-transfer-config"),
    (_given("cache_config.kv_offloading_size"), "KV offloading",
     "it stores blocks by position, and kept slots are moved; start without --kv-offloading-size"),
    (_given("attention_config.hisparse_config"), "HiSparse", "it moves blocks by position; start without it"),
    (_more_than_one("parallel_config.decode_context_parallel_size"), "decode context parallelism",
     "it spreads positions over ranks; use --tensor-parallel-size"),
    (_more_than_one("parallel_config.prefill_context_parallel_size"), "prefill context parallelism",
     "it spreads positions over ranks; use --tensor-parallel-size"),
    (_more_than_one("parallel_config.pipeline_parallel_size"), "pipeline parallelism",
     "a stage does not see the layers of the others; use --tensor-parallel-size"),
    (_given("parallel_config.enable_dbo"), "micro-batches (DBO)",
     "rows of a batch are split; start without --enable-dbo"),
    (lambda config: _at(config, "model_config.runner_type") == "pooling", "a pooling model",
     "it generates nothing that a compressed cache could serve"),
    (lambda config: bool(_at(config, "model_config.is_encoder_decoder")), "an encoder-decoder model",
     "cross-attention is not compressed"),
    (lambda config: bool(_at(config, "model_config.use_mla")), "latent attention (MLA)",
     "its slots have no heads; keepkv.Cache serves such models in transformers"),
    (lambda config: _quantised(_at(config, "cache_config.cache_dtype")), "a quantised KV cache",
     "scales of moved slots are not kept; start with --kv-cache-dtype auto, or without compression"),
)  # fmt: skip


def _quantised(dtype: Any) -> bool:
    return dtype not in (None, "auto", "float16", "half", "bfloat16", "float32", "float")


def is_ours(config: Any) -> bool:
    """Whether the engine of a ``VllmConfig`` has keepkv's worker and keepkv's scheduler."""
    classes = _at(config, "parallel_config.worker_cls"), _at(config, "scheduler_config.scheduler_cls")
    return all(_name(x).startswith(_OURS) for x in classes)


def _name(x: Any) -> str:
    return x if isinstance(x, str) else f"{getattr(x, '__module__', '')}.{getattr(x, '__qualname__', '')}"


def check_config(config: Any) -> None:
    """Raise ``KeepKVError`` where the engine of a ``VllmConfig`` does something that compression would break, or is one
    half only: a scheduler without the worker, or the other way round."""
    if not is_ours(config):
        raise KeepKVError(
            "keepkv's worker and keepkv's scheduler belong together, and one of them is another: take both from "
            "keepkv.integrations.vllm.engine_args."
        )
    for broken, what, remedy in _RULES:
        if broken(config):
            raise KeepKVError(f"keepkv cannot run beside {what}: {remedy}.")


def check_any(found: object) -> None:
    """Raise ``KeepKVError`` where nothing was ``found`` that can be compressed."""
    if not found:
        raise KeepKVError(
            "no layer of this model is one that keepkv compresses: full attention with keys and values by head, by "
            "keepkv's attention backend. keepkv.integrations.vllm.engine_args has all that belongs together."
        )


def check_layers(layers: Iterable[tuple[str, Any]], compressed: set[str]) -> None:
    """Raise ``KeepKVError`` where a layer's attention is one that compressed slots cannot serve.

    layers: name and attention module of each layer; compressed: names of those that are to be compressed.
    """
    for name, layer in layers:
        shared = getattr(layer, "kv_sharing_target_layer_name", None)
        if shared in compressed:
            raise KeepKVError(
                f"layer {name} reads the cache of {shared}, which is compressed before it does: keepkv does not serve "
                "models whose layers share their caches in vLLM; keepkv.Cache does in transformers."
            )
        if name not in compressed:
            continue
        impl = getattr(layer, "impl", None)
        if getattr(impl, "alibi_slopes", None) is not None:
            raise KeepKVError(f"layer {name} uses ALiBi, which is a bias on positions of every past token.")
        window = getattr(impl, "sliding_window", None)
        if window not in (None, -1, (-1, -1)):
            raise KeepKVError(
                f"layer {name} has a window of {window} but is kept as full attention: leave vLLM's hybrid cache "
                "manager on (no --disable-hybrid-kv-cache-manager)."
            )
