"""What is added to an attention backend of vLLM, whichever it is: its builder and its implementation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from keepkv.integrations.vllm.book import NOW
from keepkv.integrations.vllm.manager import KeepKVSpec
from keepkv.integrations.vllm.serve import parts_of, serve, shifted


class Building:
    """A builder of attention metadata, which gets ``keepkv``: the planned requests of the batch."""

    supports_update_block_table = False  # or metadata of one group of layers would be made from that of another

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Metadata for a stock kernel, from shifted tables where the batch has planned rows."""
        me: Any = self
        common, parts, book = common_attn_metadata, [], NOW.book
        if book is not None and (book.rows or book.refused) and isinstance(me.kv_cache_spec, KeepKVSpec):
            starts, tables = common.query_start_loc_cpu.tolist(), common.block_table_tensor
            parts = parts_of(book, me.layer_names, NOW.order(common), starts, _ends(common), tables)
            for part in parts:
                book.take(part)
            if parts:
                tables, lengths = shifted(parts, tables, common.seq_lens)
                common = replace(common, block_table_tensor=tables, seq_lens=lengths)
                common_prefix_len = 0  # rows no longer begin with the same blocks
        metadata = super().build(common_prefix_len, common, fast_build)  # type: ignore[misc]
        metadata.keepkv = parts
        return metadata


def _ends(common: Any) -> list[int]:
    """Tokens that each row has after this step."""
    exact = common.seq_lens if common.seq_lens.device.type == "cpu" else common.seq_lens_cpu_upper_bound
    ends: list[int] = exact.tolist()
    return ends


class Serving:
    """An implementation of attention, which serves planned requests after the stock kernel has run."""

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        output: Tensor, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """As the stock implementation. Raises what keepkv does where a row cannot be served."""
        done = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)  # type: ignore[misc]
        if NOW.book is not None and (parts := getattr(attn_metadata, "keepkv", ())):
            serve(NOW.book, parts, layer.layer_name, query, output)
        return done
