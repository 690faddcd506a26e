"""The scheduler: tells the block managers what each request asked for, limits prefix hits to what is never written,
and ends a chunk where a request is to be compressed."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from keepkv.errors import KeepKVError
from keepkv.integrations.vllm.manager import KeepKVManager
from keepkv.integrations.vllm.metrics import count
from keepkv.integrations.vllm.plan import Plan, plan_of
from keepkv.integrations.vllm.refuse import check_any, check_config
from keepkv.integrations.vllm.versions import failing
from keepkv.integrations.vllm.wish import Wish, wish_of

logger = init_logger(f"vllm.{__name__}")  # below vLLM's own, which has the handlers


class Planning:
    """What is added to a scheduler of vLLM, the one of any class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        me: Any = self
        check_config(me.vllm_config)
        managers = me.kv_cache_manager.coordinator.single_type_managers
        self.keepkv_managers = [m for m in managers if isinstance(m, KeepKVManager)]
        check_any(self.keepkv_managers)
        self.keepkv_groups = len(managers)
        groups = me.kv_cache_config.kv_cache_groups
        self.keepkv_layers = sum(
            len(group.layer_names) for group, m in zip(groups, managers, strict=True) if isinstance(m, KeepKVManager)
        )
        self.keepkv_default = (me.vllm_config.additional_config or {}).get("keepkv")
        wish_of(None, self.keepkv_default)  # a default that cannot be served is refused at start

    def keepkv_plan(self, request: Any) -> Plan | None:
        """The plan of a request. Raises ``KeepKVError`` where what it asks for cannot be served."""
        extra = request.sampling_params.extra_args if request.sampling_params else None
        wish = wish_of(extra, self.keepkv_default)
        manager, me = self.keepkv_managers[0], self
        longest: int = getattr(me, "max_model_len")  # noqa: B009
        plan = plan_of(wish, request.num_prompt_tokens, manager.block_size, self.keepkv_layers, longest)
        if plan is not None:
            self._check(request, plan.wish, plan)
        return plan

    def _check(self, request: Any, wish: Wish, plan: Plan) -> None:
        name, reasons = wish.method.name, {getattr(m.kv_cache_spec, "rotation", "") for m in self.keepkv_managers}
        if getattr(request, "resumable", False):
            raise KeepKVError("a request whose prompt still grows cannot be compressed: its end is not known")
        if plan.roams and len(self.keepkv_managers) > 1:
            raise KeepKVError(
                f"method {name!r} shares one budget between layers, and this model's lie in "
                f"{len(self.keepkv_managers)} groups of blocks. Use allocate='adakv' or 'uniform'"
            )
        if wish.method.score.needs_rope and (reason := next((x for x in reasons if x), None)):
            raise KeepKVError(
                f"method {name!r} must undo the rotation of keys, which is not known here: {reason}. Use 'snapkv', "
                "'adakv' or 'keepkv'"
            )

    def add_request(self, request: Any) -> None:
        """Add a request with its plan. One that cannot be served, and that nobody refused before, ends with an error
        after its first step: it is not run uncompressed."""
        try:
            plan = self.keepkv_plan(request)
        except KeepKVError as error:
            logger.error("keepkv: request %s is refused: %s", request.request_id, error)
            plan = None
            failing(self).add(request.request_id)
            count(requests_refused=1)
        for manager in self.keepkv_managers:
            if plan is not None:
                manager.plans[request.request_id] = plan
        if plan is not None and plan.readable < plan.longest and (self.keepkv_groups > 1 or not plan.readable):
            # Where windowed layers have blocks of their own, a hit that is cut would lack their last ones.
            request.skip_reading_prefix_cache = True
        super().add_request(request)  # type: ignore[misc]

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """After a step: requests that have ended have no plan any more, and what they gave back is counted."""
        done = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        me: Any = self
        ended = [m.forget(me.requests) for m in self.keepkv_managers]
        if ended[0]:
            count(requests=len(ended[0]), blocks_given_back=sum(sum(gone.values()) for gone in ended))
        return done

    def _get_local_prefix_cache_hit(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """A hit in the prefix cache: of a planned request, of what is never written and need not be computed."""
        me: Any = self
        blocks, tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request, *args, **kwargs)  # type: ignore[misc]
        plan = self.keepkv_managers[0].plans.get(request.request_id)
        if plan is not None and tokens > plan.readable:
            tokens = plan.readable
            blocks = me.kv_cache_manager.truncate_computed_blocks(blocks, tokens)
            boundary = min(boundary, tokens)
        return blocks, tokens, boundary, diverged

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Tokens of a chunk: up to where the request is to be compressed, and no further."""
        count: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)  # type: ignore[misc]
        plan = self.keepkv_managers[0].plans.get(request.request_id)
        event = None if plan is None else plan.next_event(num_computed_tokens)
        return count if event is None else min(count, event - num_computed_tokens)


class KeepKVScheduler(Planning, Scheduler):
    """The scheduler of a step at a time, as on CPUs."""


class KeepKVAsyncScheduler(Planning, AsyncScheduler):
    """The scheduler that plans a step while the one before it runs."""
