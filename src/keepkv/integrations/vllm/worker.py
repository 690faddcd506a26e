"""The worker: tells the book which requests a step has, and compresses what is due when its forward is over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu_worker import CPUWorker

from keepkv.integrations.vllm.book import BOOK
from keepkv.integrations.vllm.compress import Site
from keepkv.integrations.vllm.manager import KeepKVSpec
from keepkv.integrations.vllm.refuse import check_any, check_config, check_layers
from keepkv.integrations.vllm.rope import rope_of


class Compressing:
    """What is added to a worker of vLLM. transposed: how its attention backend stores keys, see ``Pool``."""

    transposed = False

    def get_kv_cache_spec(self) -> Any:
        """The layers' blocks; those of layers whose rotation cannot be undone say so to the scheduler."""
        me: Any = self
        check_config(me.vllm_config)
        specs = super().get_kv_cache_spec()  # type: ignore[misc]
        mine = {name for name, spec in specs.items() if isinstance(spec, KeepKVSpec)}
        check_any(mine)
        context = me.vllm_config.compilation_config.static_forward_context
        check_layers(context.items(), mine)
        reasons = [rope_of(me.model_runner.get_model(), name)[1] for name in mine]
        rotation = next((x for x in reasons if x), "")
        return {n: replace(s, rotation=rotation) if n in mine else s for n, s in specs.items()}

    def _settle(self) -> None:
        """Let the book know the layers, once their blocks exist."""
        me: Any = self
        runner, context = me.model_runner, me.vllm_config.compilation_config.static_forward_context
        groups = [g for g in runner.kv_cache_config.kv_cache_groups if isinstance(g.kv_cache_spec, KeepKVSpec)]
        mine = {name for group in groups for name in group.layer_names}
        names = [name for name in context if name in mine]
        sites, unknown, model = [], {}, runner.get_model()
        for rank, name in enumerate(names):
            rope, reason = rope_of(model, name)
            if reason:
                unknown[name] = reason
            impl = context[name].impl
            softcap = getattr(impl, "logits_soft_cap", None) or getattr(impl, "logits_softcap", None) or None
            sinks = getattr(impl, "sinks", None)
            sites.append(Site(name, rank, len(names), impl.num_heads, impl.scale, softcap, sinks, rope))
        BOOK.settle(sites, {name: context[name].kv_cache for name in names}, self.transposed, unknown)
        self._keepkv_block = groups[0].kv_cache_spec.block_size

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any) -> Any:
        """A step: what is due after it is compressed before the next one begins."""
        me: Any = self
        if not BOOK.sites:
            self._settle()
        BOOK.begin(
            [(x.req_id, _extra(x), x.prompt_len) for x in scheduler_output.scheduled_new_reqs],
            scheduler_output.scheduled_cached_reqs.resumed_req_ids,
            scheduler_output.finished_req_ids,
            (me.vllm_config.additional_config or {}).get("keepkv"),
            self._keepkv_block,
            me.vllm_config.model_config.max_model_len,
        )
        BOOK.order = lambda common: requests_of(me.model_runner, common)
        output = super().execute_model(scheduler_output)  # type: ignore[misc]
        BOOK.end()
        return output


def _extra(new: Any) -> Any:
    return new.sampling_params.extra_args if new.sampling_params else None


def requests_of(runner: Any, common: Any) -> list[str]:
    """The request of each row of a batch: the newer runner says it in the batch, the older has its rows in order."""
    if getattr(common, "req_idx", None) is not None:
        table = runner.req_states.index_to_req_id
        return [table[int(i)] for i in common.req_idx[: common.num_reqs]]
    return list(runner.input_batch.req_ids[: common.num_reqs])


class KeepKVWorker(Compressing, CPUWorker):
    """The worker on CPUs, whose attention stores the keys of a head as columns."""

    transposed = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Here, not in every process: an engine with another worker keeps vLLM's own backend.
        register_backend(AttentionBackendEnum.CPU_ATTN, "keepkv.integrations.vllm.cpu.KeepKVBackend")
        super().__init__(*args, **kwargs)
