"""keepkv inside vLLM: requests whose KV cache is compressed, in an engine that serves them beside ordinary ones.

    llm = vllm.LLM(model, **keepkv.integrations.vllm.engine_args(method="snapkv", budget=0.25))

vLLM finds ``register`` by the entry point ``vllm.general_plugins`` and calls it in each of its processes.
"""

from __future__ import annotations

from keepkv.integrations.vllm.flags import engine_args, serve_flags
from keepkv.integrations.vllm.register import register

__all__ = ["engine_args", "register", "serve_flags"]
