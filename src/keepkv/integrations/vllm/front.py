"""The front door: a request that cannot be served is answered with 400 before it reaches the engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from keepkv.errors import KeepKVError
from keepkv.integrations.vllm.refuse import is_ours
from keepkv.integrations.vllm.versions import config_of_caller, logits_processors
from keepkv.integrations.vllm.wish import PREFIX, wish_of


class KeepKVParams(*logits_processors()):  # type: ignore[misc]
    """A logits processor that changes nothing: vLLM asks each of them whether a request's parameters are valid."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ``ValueError`` where what the request asks of keepkv cannot be served by this engine."""
        extra = sampling_params.extra_args or {}
        if not any(name.startswith(PREFIX) for name in extra):
            return
        config = config_of_caller()
        if config is not None and not is_ours(config):
            raise ValueError(
                "keepkv: this engine was started without keepkv's worker and scheduler, and would run the request "
                "uncompressed. Start it with the flags that `keepkv serve --engine vllm` prints."
            )
        try:
            # Where the engine's default is not known, a budget stands for it.
            wish_of(extra, {"budget": 1.0} if config is None else (config.additional_config or {}).get("keepkv"))
        except KeepKVError as error:
            raise ValueError(f"keepkv: {error}") from error

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def apply(self, logits: Tensor, *args: Any) -> Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        return None

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False
