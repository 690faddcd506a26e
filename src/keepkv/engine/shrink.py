"""A small model of the same architecture: what a configuration says of its layers is kept, its sizes are not."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from transformers import PreTrainedConfig

PLAIN_TOKENS = 96  # token ids below are ordinary ones in every small model
_HEADS = 4
# Names that configurations give to sizes, and the small size. Sizes of heads are kept: rotations depend on them.
_SIZES: dict[str, int] = {
    r"(?!patch|audio|image).*vocab_size.*": 128,
    r"(.*_)?(intermediate|ffn|ff|mlp|feed_forward|inner|expert)_(hidden_)?(size|dim)(_mlp)?": 64,
    r"n_inner|d_ff|dff|dim_ff": 64,
    r"(num|n|moe_num|num_local|n_routed|num_routed)_experts": 4,
    r"(.*_)?experts_per_tok(en)?|(?!index).*topk|top_k_experts|moe_k|moe_top_k": 2,
    r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|moe_num_shared_experts": 1,
    r"first_k_dense_replace|num_dense_layers|moe_layer_start_index": 1,
    r"(.*_)?sliding_window(_size)?|attention_chunk_size|(attention_)?window_size|local_attention": 16,
    r"q_lora_rank|kv_lora_rank|o_lora_rank|laurel_rank": 32,
    r"(.*_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions": 1024,
    r"linear_num_(key_|value_)?heads": 2,
    r"hidden_size_per_layer_input|linear_(key_|value_)?head_dim|(mamba_)?chunk_size": 16,
}
_HIDDEN = r"hidden_size|n_embd|d_model|dim_model|emb_dim|word_embed_proj_dim|embedding_size|embed_dim"
_TO_TEXT = r"(out|text|output)_(hidden_size|dim)"  # of a part that sees or hears: the width of the text part
_QUERY_HEADS = r"(.*_)?num_attention_heads(_per_layer)?|num_heads|n_heads?|((de|en)coder_)?attention_heads"
_KV_HEADS = r"(.*_)?num_key_value_heads|num_kv_heads|num_query_groups"
_LAYERS = r"num_hidden_layers|n_layers?|num_layers|layers|(de|en)coder_layers|num_(de|en)coder_layers|depth"
_KINDS = ("layer_types", "layers_block_type", "block_types", "attention_layers")


def shrink(config: PreTrainedConfig, each: int | None = None, **changes: Any) -> PreTrainedConfig:
    """A copy of ``config`` whose model has the same class and the same kinds of layers, and takes little memory.

    each: how many layers of each kind are kept; None: all of them. changes: values of the text part, set as they are.
    """
    values = config.to_dict()
    text = config.get_text_config(decoder=True)
    name = next((key for key in config.sub_configs if getattr(config, key, None) is text), None)
    _shrink(values, each)
    part = values if name is None else values[name]
    part.update(changes)
    _join(values, part)
    return type(config).from_dict(values)


def _shrink(values: dict[str, Any], each: int | None) -> None:
    """Make the sizes in ``values``, a configuration and those inside of it, small."""
    for part in values.values():
        if isinstance(part, dict) and "model_type" in part:
            _shrink(part, each)
    counted = [name for name in values if re.fullmatch(_LAYERS, name) and isinstance(values[name], int)]
    for name in counted:
        kept = _kept(values, values[name], each)
        _cut(values, values[name], kept)
        values[name] = len(kept)
    head = _head_size(values)
    queries = next((values[x] for x in values if re.fullmatch(_QUERY_HEADS, x) and isinstance(values[x], int)), None)
    for name, value in values.items():
        values[name] = _small(name, value, head, queries)
    for own in (values.get("per_layer_config") or {}).values():
        own.update({name: _small(name, x, head, own.get("num_attention_heads", queries)) for name, x in own.items()})
    _renumber(values)


def _kept(values: dict[str, Any], count: int, each: int | None) -> list[int]:
    """Indices of the layers that stay: the first ``each`` of every kind, at least two."""
    lists = [values[x] for x in _KINDS if isinstance(values.get(x), (list, tuple)) and len(values[x]) == count]
    own = count - (values.get("num_kv_shared_layers") or 0)  # later layers attend to what earlier ones hold
    seen: Counter[Any] = Counter()
    kept = []
    for i in range(count):
        kind = (i >= own, *(x[i] for x in lists))
        seen[kind] += 1
        if each is None or seen[kind] <= each:
            kept.append(i)
    return kept


def _cut(values: dict[str, Any], count: int, kept: list[int]) -> None:
    """Leave of every value that is given by layer those of ``kept``."""
    for name, value in values.items():
        if isinstance(value, (list, tuple)) and len(value) == count > 1:
            values[name] = [value[i] for i in kept]
    if values.get("num_kv_shared_layers"):
        values["num_kv_shared_layers"] = sum(i >= count - values["num_kv_shared_layers"] for i in kept)
    if values.get("per_layer_config"):
        by_layer = {int(i): value for i, value in values["per_layer_config"].items()}
        values["per_layer_config"] = {new: by_layer[old] for new, old in enumerate(kept) if old in by_layer}


def _head_size(values: dict[str, Any]) -> int | None:
    """Size of a head where it follows from the width of the model, None where it is given."""
    if values.get("head_dim") or values.get("kv_lora_rank"):
        return None
    hidden = next((values[x] for x in values if re.fullmatch(_HIDDEN, x) and isinstance(values[x], int)), None)
    heads = next((values[x] for x in values if re.fullmatch(_QUERY_HEADS, x) and isinstance(values[x], int)), None)
    return hidden // heads if hidden and heads else None


def _small(name: str, value: Any, head: int | None, queries: int | None) -> Any:
    if isinstance(value, (list, tuple)) and re.fullmatch(_QUERY_HEADS + "|" + _KV_HEADS, name):
        return [_small(name, x, head, queries) for x in value]
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    if re.fullmatch(_QUERY_HEADS, name):
        return _HEADS
    if re.fullmatch(_KV_HEADS, name):
        return _HEADS if value == queries else 1 if value == 1 else _HEADS // 2
    if re.fullmatch(_HIDDEN, name):
        return 64 if head is None else _HEADS * head
    return next((min(value, size) for pattern, size in _SIZES.items() if re.fullmatch(pattern, name)), value)


def _join(values: dict[str, Any], text: dict[str, Any]) -> None:
    """Let the parts that see or hear end in the width of ``text``, the text part."""
    for part in values.values():
        if isinstance(part, dict) and "model_type" in part and part is not text:
            part.update({name: text.get("hidden_size") for name in part if re.fullmatch(_TO_TEXT, name)})


def _renumber(values: dict[str, Any]) -> None:
    """Give special tokens ids that a small vocabulary has, other ones each."""
    new: dict[int, int] = {}
    for name, value in values.items():
        ids = value if isinstance(value, list) else [value]
        if not re.fullmatch(r".*_token_(id|index)", name) or not all(type(x) is int for x in ids):
            continue
        mine = [x if x < 3 else new.setdefault(x, PLAIN_TOKENS + len(new)) for x in ids]
        values[name] = mine if isinstance(value, list) else mine[0]
