"""What must agree in a cache file: its header, its tensors, and the model that it is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from keepkv.core.tensorfile import Declared
from keepkv.core.tokens import FACTS
from keepkv.engine.files import contents
from keepkv.engine.files.shapes import COUNTS, FLOATS, Field, Shapes
from keepkv.engine.layer import Layer
from keepkv.engine.model import attention_modules
from keepkv.engine.state import CacheParts

Header = Mapping[str, Any]


def check_shapes(
    cache: CacheParts, header: Header, declared: Mapping[str, Declared], model: PreTrainedModel | None = None
) -> None:  # fmt: skip
    """Raise ``ValueError`` unless a file of ``header`` has the tensors that it implies for the layers of ``cache``.
    model: keys must fit it; None where its own cache is written."""
    modules, found = {} if model is None else attention_modules(model), Shapes(declared)
    kinds = FLOATS if model is None else (model.dtype,)
    found.letters |= {"columns": header["columns"], "one": 1}
    clock = {"seen": Field(("B",), COUNTS), "positions": Field(("B", "T"), COUNTS)}
    may = {"tokens": Field(("B", "columns"), (torch.bool,), False), "offsets": Field(("B", "one"), COUNTS, False)}
    found.letters["facts"] = cache.shared.positions.axes + FACTS
    begun = found.take("clock.", clock | may)
    found.take("clock.", {"runs": Field(("B", "runs"), COUNTS), "facts": Field(("B", "runs", "facts"), (torch.int32,))})
    rows, columns = found.letters.get("B", 0), header["columns"]
    if (begun and not rows) or (not begun and (columns or header["decoded"])):
        raise ValueError(f"{columns} columns of {rows} rows")
    if len(header["decoded"]) != rows:
        raise ValueError(f"decoded has {len(header['decoded'])} numbers for {rows} rows")
    if cache.shared.spans is not None:
        found.take("spans.", {"which": Field(("B",), COUNTS), "prompt": Field(("B",), COUNTS, False)})
    lengths, kept = set(), _remembered(cache)
    for i, (layer, entry) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        known = _dims(modules.get(i), layer)
        if isinstance(layer, Layer) or begun:
            known["B"] = rows
        if isinstance(layer, Layer):
            lengths.add(_length_of_ours(f"layers[{i}]", entry, header, known))
            known |= {"Q": entry["host"]["query_heads"], **kept}
            found.layer(f"{i}.", layer, kinds, known)
        else:
            found.letters = known
            fields = {"keys": Field(("B", "H", "L", "D"), kinds), "values": Field(("B", "H", "L", "V"), kinds)}
            held = found.letters["L"] if found.take(f"{i}.", fields) else 0
            lengths |= _length_of_window(f"layers[{i}]", layer, entry, held)
    if found.left:
        raise ValueError(f"tensor {next(iter(found.left))!r:.60} belongs to nothing")
    ours = any(isinstance(layer, Layer) for layer in cache.layers)
    if len(lengths) > 1 or (ours and max(lengths) > columns):
        raise ValueError(f"layers have read {sorted(lengths)} columns of {columns}: a forward was broken off")


def _remembered(cache: CacheParts) -> dict[str, int]:
    """How many queries the score keeps under each name."""
    spans, made = cache.shared.spans, dict(cache.shared.settings.method.score.remembers)
    if "span_window" in made and spans is not None:  # at least one of each span
        fair = max(sum(span.mode == "fair" for span in row) for row in spans.policy.lists)
        made["span_window"] = max(made["span_window"], fair)
    return made


def _dims(module: Any, layer: Any) -> dict[str, int]:
    """Heads and dimensions of what an attention module caches, as far as it tells them; without one, of what ``layer``
    holds."""
    if module is None and isinstance(layer, Layer) and layer.store.length:
        keys, values = layer.store.like()
        return {"D": keys.shape[-1], "V": values.shape[-1]}
    if isinstance(layer, Layer) and layer.form.one_content:
        return {} if module is None else {"H": 1, "D": module.kv_lora_rank, "V": module.qk_rope_head_dim}
    heads, groups = (getattr(x, name, None) for x, name in (
        (getattr(module, "config", None), "num_attention_heads"), (module, "num_key_value_groups"),
    ))  # fmt: skip
    width = getattr(module, "head_dim", None)
    made = {"H": heads // groups} if type(heads) is int and type(groups) is int and groups > 0 else {}
    return made | ({"D": width, "V": width} if type(width) is int and not hasattr(module, "v_head_dim") else {})


def _length_of_ours(where: str, entry: Header, header: Header, known: Mapping[str, int]) -> int:
    """Columns that a layer of ours has read."""
    host, heads = entry["host"], entry["host"]["query_heads"]
    seen: int = host["seen"]
    if (heads > 0) != (entry["attention"].keys() == {"scaling", "softcap"}):
        raise ValueError(f"{where} has {heads} query heads, and attention {entry['attention']}"[:200])
    if ("H" in known and heads % known["H"]) or (seen and not heads):
        raise ValueError(f"{where}.host.query_heads is {heads}")
    if host["settled"] > seen or (host["compressed"] and not seen):
        raise ValueError(f"{where} was compressed after {host['settled']} of {seen} columns")
    if max(header["decoded"], default=0) > header["columns"]:
        raise ValueError("decoded has more tokens than were read")
    return seen


def _length_of_window(where: str, layer: Any, entry: Header, held: int) -> set[int]:
    """Columns that a layer of transformers' has read; none of one that holds nothing of its own. held: that it has."""
    length: int = entry["cumulative_length"]
    if not isinstance(layer, DynamicSlidingWindowLayer):
        if held or length or entry["record_past"]:
            raise ValueError(f"{where} of kind {entry['kind']} holds something")
        return set()
    most, least = length, min(length, layer.sliding_window - 1)
    if not least <= held <= most:
        raise ValueError(f"{where} holds {held} of {length} columns, and its window {layer.sliding_window}")
    return {length}


def check_contents(cache: CacheParts, header: Header, tensors: Mapping[str, Tensor], former: bool = False) -> None:
    """Raise ``ValueError`` where tensors, whose shapes are right, hold what no cache holds. former: the file is of the
    former format, which does not say where rows have padding."""
    columns, spans = header["columns"], cache.shared.spans
    seen = tensors.get("clock.seen", torch.zeros(0, dtype=torch.int64))
    contents.whole("clock.seen", seen, 0, columns)
    if "clock.positions" in tensors:
        contents.positions("clock.positions", tensors["clock.positions"], seen)
        if bool(((tensors["clock.positions"] >= 0).sum(-1) > seen).any()):
            raise ValueError("the latest forward has more tokens than were seen")
    if "clock.offsets" in tensors:
        contents.whole("clock.offsets", tensors["clock.offsets"], -columns, 2**31 - 1)
    if "clock.runs" in tensors:
        contents.runs("clock.", tensors["clock.runs"], tensors["clock.facts"], seen)
    if "clock.tokens" in tensors:
        contents.truths("clock.tokens", tensors["clock.tokens"])
        if not torch.equal(tensors["clock.tokens"].sum(-1), seen):
            raise ValueError("tensor 'clock.tokens' has other tokens than 'clock.seen'")
    elif not former and bool((seen != columns).any()):
        raise ValueError("tensor 'clock.tokens' is missing: rows have padding")
    if spans is not None and "spans.which" in tensors:
        contents.whole("spans.which", tensors["spans.which"], 0, len(spans.policy.lists) - 1)
    if "spans.prompt" in tensors:
        contents.whole("spans.prompt", tensors["spans.prompt"], 0, seen)
    starts = cache.shared.settings.method.reduce.row_starts
    for i, layer in enumerate(cache.layers):
        mine = {name.partition(".")[2]: x for name, x in tensors.items() if name.partition(".")[0] == str(i)}
        groups: dict[str, dict[str, Tensor]] = {}
        for name, x in mine.items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = x
        if isinstance(layer, Layer):
            contents.store(f"{i}.store.", layer.store, groups.get("store", {}), seen, columns)
        for name, x in groups.get("state", {}).items():
            contents.state(f"{i}.state.{name}", x, columns, name in starts)
        for name, x in groups.get("count", {}).items():
            contents.numbers(f"{i}.count.{name}", x)
            if not x.is_floating_point():
                contents.whole(f"{i}.count.{name}", x, 0, 1 << 53)
        for name in ("sinks", "keys", "values"):
            if name in mine:
                contents.numbers(f"{i}.{name}", mine[name])


def check_restored(cache: CacheParts) -> None:
    """Raise ``ValueError`` where a layer does not hold what its progress says."""
    for layer in cache.layers:
        if isinstance(layer, Layer):
            seen, held = layer.get_seq_length(), layer.store.length
            if layer.progress.compressed and held > seen:  # rows that left may leave empty columns behind
                held = int(layer.store.lengths.max())
            if (not layer.progress.compressed and held != seen) or held > seen:
                raise ValueError(f"layer {layer.info.index} holds {held} columns of slots of {seen} that it has read")
