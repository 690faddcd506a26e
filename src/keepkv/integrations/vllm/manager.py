"""Scheduler side: which blocks a request gives back, and which the prefix cache may know."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from keepkv.integrations.vllm.plan import Plan
from keepkv.integrations.vllm.pool import SLOT_BYTES


class KeepKVManager(FullAttentionManager):
    """The blocks of layers with full attention, some of whose requests have a plan."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: dict[str, Plan] = {}
        self.given_back: dict[str, int] = {}  # blocks, by request

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Enter blocks into the prefix cache: of a planned request those that no compression writes to."""
        plan = self.plans.get(request.request_id)
        if plan is None:
            super().cache_blocks(request, num_tokens, *args, **kwargs)
        else:
            # That of the base class enters no block that is filled in part: compressed slots will be written there.
            SingleTypeKVCacheManager.cache_blocks(self, request, min(num_tokens, plan.untouched), *args, **kwargs)

    def remove_skipped_blocks(self, request_id: str, processed_computed_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Give back the blocks that are read no more once so many tokens are processed."""
        plan = self.plans.get(request_id)
        if plan is None or request_id not in self.req_to_blocks:
            return
        blocks, first = self.req_to_blocks[request_id], plan.first_block(processed_computed_tokens)
        self.given_back[request_id] = max(first, self.given_back.get(request_id, 0))
        self._remove_blocks_in_range(request_id, 0, min(first, len(blocks)))

    def forget(self, known: Container[str]) -> dict[str, int]:
        """Drop the plans of requests that are not ``known``, and say how many blocks each gave back before its end. A
        preempted request is known: it comes back."""
        gone = [name for name in self.plans if name not in known]
        for name in gone:
            del self.plans[name]
        return {name: self.given_back.pop(name, 0) for name in gone}


@register_kv_cache_spec(manager_class=KeepKVManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class KeepKVSpec(FullAttentionSpec):
    """Full attention whose pages have room for votes, positions and a statistic of each slot behind them, counted by
    vLLM itself. rotation: why a layer's rotation cannot be undone, empty where it can."""

    rotation: str = ""

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """The spec of a group of layers: vLLM's names the fields that it knows."""
        rotation = next((spec.rotation for spec in specs if spec.rotation), "")
        return replace(super().merge(specs), rotation=rotation)

    @classmethod
    def of(cls, spec: Any) -> Any:
        """``spec`` as one of these where it is of a layer with full attention, and otherwise as it is."""
        if type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
            return spec
        mine = cls(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init})
        room = mine.num_heads * mine.num_states * SLOT_BYTES
        padded: dict[str, Any] = {"page_size_padded": mine.unpadded_page_size_bytes + room}
        return replace(mine, **padded)
