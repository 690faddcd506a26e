"""The worker: tells the book which requests a step has, and compresses what is due when its forward is over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from keepkv.core.calibration import Calibration, of_layer
from keepkv.integrations.vllm.book import Book, Row, running
from keepkv.integrations.vllm.calibrated import calibrations, check_model
from keepkv.integrations.vllm.compress import Site
from keepkv.integrations.vllm.manager import KeepKVSpec
from keepkv.integrations.vllm.metrics import count
from keepkv.integrations.vllm.refuse import check_any, check_config, check_layers
from keepkv.integrations.vllm.rope import rope_of
from keepkv.integrations.vllm.wish import SERVERS

logger = init_logger(f"vllm.{__name__}")  # below vLLM's own, which has the handlers


class Compressing:
    """What is added to a worker of vLLM. transposed: how its attention backend stores keys, see ``Pool``."""

    transposed = False
    _book: Book | None = None

    def get_kv_cache_spec(self) -> Any:
        """The layers' blocks; those of layers whose rotation cannot be undone say so to the scheduler."""
        me: Any = self
        check_config(me.vllm_config)
        specs = super().get_kv_cache_spec()  # type: ignore[misc]
        mine = {name for name, spec in specs.items() if isinstance(spec, KeepKVSpec)}
        check_any(mine)
        context = me.vllm_config.compilation_config.static_forward_context
        check_layers(context.items(), mine)
        self._check_calibrations(mine)
        reasons = [rope_of(me.model_runner.get_model(), name)[1] for name in mine]
        rotation = next((x for x in reasons if x), "")
        return {n: replace(s, rotation=rotation) if n in mine else s for n, s in specs.items()}

    def _check_calibrations(self, names: Iterable[str]) -> None:
        me: Any = self
        config, ranks = me.vllm_config.model_config, me.vllm_config.parallel_config.tensor_parallel_size
        layers = [extract_layer_index(name) for name in names]
        check_model(self._calibrations, config.hf_text_config, config.model, layers, ranks)

    @property
    def _calibrations(self) -> Mapping[str, Calibration]:
        return calibrations(_default(self).get(SERVERS))

    def _settled(self) -> Book:
        """The book of this worker, made when its blocks exist."""
        me: Any = self
        if self._book is None:
            runner, context = me.model_runner, me.vllm_config.compilation_config.static_forward_context
            groups = [g for g in runner.kv_cache_config.kv_cache_groups if isinstance(g.kv_cache_spec, KeepKVSpec)]
            mine = {name for group in groups for name in group.layer_names}
            names = [name for name in context if name in mine]
            known = [of_layer(self._calibrations, extract_layer_index(name), runner.device) for name in names]
            sites = [
                site_of(runner.get_model(), name, context[name].impl, i, len(names), known[i])
                for i, name in enumerate(names)
            ]
            self._book = Book(
                sites,
                {name: context[name].kv_cache for name in names},
                groups[0].kv_cache_spec.block_size,
                self.transposed,
                me.vllm_config.model_config.max_model_len,
                _default(self),
            )
        return self._book

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any) -> Any:
        """A step: what is due after it is compressed before the next one begins."""
        me: Any = self
        book = self._settled()
        done = book.begin(
            [(x.req_id, _extra(x), x.prompt_len) for x in scheduler_output.scheduled_new_reqs],
            list(scheduler_output.scheduled_cached_reqs.resumed_req_ids),
            list(scheduler_output.finished_req_ids),
        )
        for request, row in done:
            logger.info("keepkv: %s: %s", request, row.receipt())
            _count(row)
        with running(book, lambda batch: requests_of(me.model_runner, batch)):
            output = super().execute_model(scheduler_output)  # type: ignore[misc]
        book.end()
        return output


def _count(row: Row) -> None:
    done = row.counts
    count(compressions=done.events, slots_kept=done.kept, slots_dropped=done.dropped, slots_merged=done.merged)


def _default(worker: Any) -> Mapping[str, Any]:
    """What the server does with requests that ask for nothing, and what it was started with."""
    return (worker.vllm_config.additional_config or {}).get("keepkv") or {}


def site_of(
    model: Any, name: str, impl: Any, rank: int, layers: int, calibration: Mapping[str, Tensor] | None = None
) -> Site:
    """What is known of the layer ``name`` with the attention ``impl``, and what was measured of it."""
    softcap = getattr(impl, "logits_soft_cap", None) or getattr(impl, "logits_softcap", None) or None
    sinks = getattr(impl, "sinks", None)
    rope = rope_of(model, name)[0]
    return Site(name, rank, layers, impl.num_heads, impl.scale, softcap, sinks, rope, calibration)


def _extra(new: Any) -> Any:
    return new.sampling_params.extra_args if new.sampling_params else None


def requests_of(runner: Any, common: Any) -> list[str]:
    """The request of each row of a batch: the newer runner says it in the batch, the older has its rows in order."""
    if getattr(common, "req_idx", None) is not None:
        table = runner.req_states.index_to_req_id
        return [table[int(i)] for i in common.req_idx[: common.num_reqs]]
    return list(runner.input_batch.req_ids[: common.num_reqs])
