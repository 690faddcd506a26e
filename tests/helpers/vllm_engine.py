"""A small model served by vLLM in this process, and the replies that keepkv's own cache gives to the same requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import keepkv
from benchmarks.vllm.ties import is_tie
from keepkv.engine.versions import CACHE
from keepkv.integrations.vllm.wish import Wish, wish_of
from keepkv.methods import Method

VOCABULARY, LAYERS, HEADS, DIM, BLOCK = 512, 3, 2, 32, 32
TOKENS = 40


@dataclass(frozen=True)
class Request:
    """A prompt of ``length`` random tokens, ``tokens`` of reply, and what is asked of keepkv. shared: that many of its
    first tokens are those of every prompt with the same ``root``."""

    length: int
    keys: dict[str, Any] = field(default_factory=dict)
    tokens: int = TOKENS
    seed: int = 0
    shared: int = 0
    root: int = 0

    @property
    def extra(self) -> dict[str, Any]:
        return {f"keepkv_{name}": x for name, x in self.keys.items()}

    @property
    def prompt(self) -> list[int]:
        return _tokens(self.root, self.shared) + _tokens(1 + self.seed, self.length - self.shared)


def _tokens(seed: int, count: int) -> list[int]:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count,), generator=made).tolist()


def save_model(folder: Path, layers: int = LAYERS) -> str:
    """A checkpoint of a random Llama whose replies vary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=256, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=HEADS, head_dim=DIM, max_position_embeddings=4096,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


class Reference:
    """The same model in transformers. default: what the server was started with."""

    def __init__(self, path: str, default: dict[str, Any] | None = None) -> None:
        self.default = default
        self.model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
        self._known: dict[Any, list[int]] = {}

    def reply(self, request: Request) -> list[int]:
        """Greedy tokens with ``keepkv.Cache``, or with transformers' own cache where nothing is asked."""
        key = (request.length, tuple(sorted(request.keys.items())), request.tokens, *request.prompt[:3], request.seed)
        if key not in self._known:
            wish = wish_of(request.extra, self.default)
            self._known[key] = self._replied(request, wish, None if wish is None else wish.method)
        return self._known[key]

    def is_tie(self, request: Request, reply: list[int]) -> bool:
        """Whether ``reply`` is what rounding alone may make of it: two slots have scores that hardly differ."""
        wish = wish_of(request.extra, self.default)
        return wish is not None and is_tie(wish.method, reply, partial(self._replied, request, wish))

    def _replied(self, request: Request, wish: Wish | None, method: Method | None) -> list[int]:
        kept = {}
        if wish is not None and method is not None:
            asked, known = wish.settings, list(wish.settings.calibrations.values())
            kept = {CACHE: keepkv.Cache(self.model, method, wish.budget, seed=asked.seed, calibration=known)}
        ids = torch.tensor([request.prompt])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.tokens, do_sample=False,
            eos_token_id=None, **kept,
        )  # fmt: skip
        said: list[int] = out[0, request.length :].tolist()
        return said


def blocks_of(count: int) -> int:
    """Bytes of KV memory that hold ``count`` blocks of this model in keepkv's engine, in float32."""
    return count * LAYERS * HEADS * BLOCK * (2 * DIM * 4 + 12)


class Engine:
    """vLLM in this process. blocks: of KV memory; at_once: tokens a step; args: further keywords of ``vllm.LLM``."""

    def __init__(self, path: str, blocks: int = 400, at_once: int = 512, **args: Any) -> None:
        from vllm import LLM

        given: dict[str, Any] = dict(
            skip_tokenizer_init=True, enforce_eager=True, dtype="float32", block_size=BLOCK, max_model_len=2048,
            kv_cache_memory_bytes=blocks_of(blocks), max_num_batched_tokens=at_once, disable_log_stats=False,
        )  # fmt: skip
        self.llm = LLM(path, **{**given, **args})

    def replies(self, requests: Sequence[Request]) -> list[list[int]]:
        """Greedy tokens of requests that are all sent at once."""
        outs = self.llm.generate(
            [{"prompt_token_ids": x.prompt} for x in requests], [parameters(x) for x in requests], use_tqdm=False
        )
        self.cached = [out.num_cached_tokens for out in outs]
        return [list(out.outputs[0].token_ids) for out in outs]

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def used(self) -> int:
        """Blocks that requests hold now."""
        return int(self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks())

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        from keepkv.integrations.vllm.register import restore_backend

        restore_backend()
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()


def parameters(request: Request) -> Any:
    """Greedy sampling of a request."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, ignore_eos=True, detokenize=False, max_tokens=request.tokens, extra_args=request.extra or None
    )


def agree(requests: Iterable[Request], replies: Iterable[list[int]], reference: Reference) -> None:
    """Fail where a reply is not, token for token, what the reference says; all requests that differ are named.

    One that differs by a tie is let pass, one in eight of them at most: which slot stays is then up to rounding, and
    with it the reply. That it is one is shown, see ``benchmarks.vllm.ties``.
    """
    wrong, ties, count = [], 0, 0
    for request, reply in zip(requests, replies, strict=True):
        expected, count = reference.reply(request), count + 1
        if reply != expected and reference.is_tie(request, reply):
            ties += 1
        elif reply != expected:
            same = next((i for i, (a, b) in enumerate(zip(reply, expected, strict=False)) if a != b), len(reply))
            wrong.append(f"{request.keys} on {request.length} tokens: the first {same} of {len(expected)} agree")
    assert not wrong, "\n".join(wrong)
    assert ties <= max(1, count // 8), f"{ties} ties among {count} replies"
