"""A model of transformers whose requests lie in blocks, served by the plugin's own parts as vLLM would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from keepkv.core.calibration import Calibration, of_layer
from keepkv.core.rope import Rope
from keepkv.integrations.vllm.attend import attend_slots
from keepkv.integrations.vllm.book import Book, Part, Row
from keepkv.integrations.vllm.compress import Site
from keepkv.integrations.vllm.pool import SLOT_BYTES
from keepkv.integrations.vllm.serve import serve

NAME, BLOCK = "keepkv-paged", 16


class Paged:
    """Blocks, and the layers of ``model`` (Llama's kind, in float32) that attend over them; one request at a time.

    Every part that vLLM's own kernel would serve attends in plain torch here, over the slots that pages say are held.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: int = 64, calibrations: Mapping[str, Calibration] | None = None,
        longest: int = 1024, default: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        config = model.config
        self.model, self.heads, self.dim = model, config.num_key_value_heads, config.head_dim
        self.queries, self.layers = config.num_attention_heads, config.num_hidden_layers
        page = self.heads * BLOCK * (2 * self.dim * 4 + SLOT_BYTES) // 4
        buffer = torch.full((self.layers, blocks, page), float("nan"))  # what is read must have been written
        inner = (BLOCK * 2 * self.dim, 2 * self.dim, 1)
        names = [f"model.layers.{i}.self_attn.attn" for i in range(self.layers)]
        self.caches = {
            name: torch.as_strided(
                buffer, (blocks, self.heads, BLOCK, 2 * self.dim), (page, *inner), buffer[i].storage_offset()
            )
            for i, name in enumerate(names)
        }
        rotary, cpu = model.model.rotary_emb, torch.device("cpu")
        rope = Rope(rotary.inv_freq, rotary.attention_scaling, False)
        sites = [
            Site(
                name, i, self.layers, self.queries, self.dim**-0.5, rope=rope,
                calibration=of_layer(calibrations or {}, i, cpu),
            )
            for i, name in enumerate(names)
        ]  # fmt: skip
        self.names, self.table = names, torch.randperm(blocks, generator=torch.Generator().manual_seed(blocks))
        self.book = Book(sites, self.caches, BLOCK, False, longest, default)
        self.part: Part | None = None
        self.positions: list[Tensor] = []  # (H,S) of each layer when the latest reply ended
        AttentionInterface.register(NAME, self.attend)

    def reply(
        self, prompt: Sequence[int], extra: Mapping[str, Any], count: int, chunks: Sequence[int],
        lost_after: Sequence[int] = (),
    ) -> list[int]:  # fmt: skip
        """``count`` greedy tokens. chunks: sizes in which a prompt is read, the last one again and again. lost_after:
        tokens of the reply after which the blocks are lost, and all is read again."""
        self.book.begin([("it", extra, len(prompt))], [], [])
        before, self.model.config._attn_implementation = self.model.config._attn_implementation, NAME
        try:
            said: list[int] = []
            row = self.book.rows.get("it")
            done = self._read(row, list(prompt), 0, chunks)
            for i in range(count):
                said.append(done)
                if i == count - 1:
                    self._look()
                    break
                if i + 1 in lost_after:
                    self.book.begin([], ["it"], [])
                    row = self.book.rows.get("it")
                    done = self._read(row, [*prompt, *said], 0, chunks)
                else:
                    done = self._read(row, [*prompt, *said], len(prompt) + i, (1,))
            return said
        finally:
            self.model.config._attn_implementation = before
            self.book.begin([], [], ["it"])

    def _look(self) -> None:
        assert self.part is not None
        layers = [self.book.layer(self.part, name) for name in self.names]
        self.positions = [x.pages.read(x.held, self.part.end).positions[0] for x in layers]

    def _read(self, row: Row | None, tokens: list[int], begin: int, chunks: Sequence[int]) -> int:
        """Read from token ``begin`` on, and say what comes next."""
        sizes = iter(chunks)
        size = next(sizes)
        while begin < len(tokens):
            end = min(begin + size, len(tokens))
            if row is not None and (event := row.plan.next_event(begin)) is not None:
                end = min(end, event)
            token = self._step(row, tokens, begin, end)
            begin, size = end, next(sizes, size)
        return token

    @torch.inference_mode()
    def _step(self, row: Row | None, tokens: list[int], begin: int, end: int) -> int:
        assert row is not None, "this is for planned requests"
        self.part = Part("it", row, 0, 0, begin, end, self.table, self.names)
        self.book.begin([], [], [])
        self.book.take(self.part)
        ids, at = torch.tensor([tokens[begin:end]]), torch.arange(begin, end)[None]
        logits = self.model(ids, position_ids=at, use_cache=False, attention_mask=None).logits
        self.book.end()
        gone = row.plan.first_block(end)
        for cache in self.caches.values():  # what was given back belongs to others
            cache[self.table[:gone]] = float("nan")
        return int(logits[0, -1].argmax())

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """What transformers calls: query (1,Hq,T,D), key and value (1,H,T,D) of the new tokens."""
        part, name = self.part, self.names[module.layer_idx]
        assert part is not None
        at = torch.arange(part.begin, part.end)
        block, offset = part.table[at // BLOCK], at % BLOCK
        self.caches[name][block, :, offset] = torch.cat((key, value), dim=-1)[0].transpose(0, 1)
        layer, q = self.book.layer(part, name), query[0].transpose(0, 1).contiguous()
        layer.pages.begin(layer.held, part.begin, part.end)
        out = torch.empty_like(q)
        if part.exact:
            slots = layer.pages.read(layer.held, part.end)
            out.copy_(attend_slots(q, slots, layer.site.scaling, False, None, None))
        serve(self.book, [part], name, q, out)
        return out[None], None
