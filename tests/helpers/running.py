"""Running tiny models in tests: batches with left padding, greedy generation with logits."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import zoo
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import keepkv
from keepkv.engine.versions import CACHE

LENGTHS = (61, 33, 3)


def batch(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> dict[str, Tensor]:
    """Random prompts of the given lengths, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(3, zoo.VOCAB, (length,), generator=generator)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def row(inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """Row ``i`` without its padding."""
    real = inputs["attention_mask"][i].bool()
    return {name: x[i : i + 1, real] for name, x in inputs.items()}


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], cache: Any, new: int = 6, **options: Any) -> Any:
    """Greedy generation that also returns logits (B, new, vocabulary) as ``.scores_``."""
    out = model.generate(
        **inputs,
        **{CACHE: cache},
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    out.scores_ = torch.stack(out.logits, dim=1)
    return out


@cache
def plain(name: str, lengths: tuple[int, ...] = LENGTHS, new: int = 6) -> Any:
    """What transformers' own cache generates."""
    model = zoo.model(name)
    return generate(model, batch(lengths), DynamicCache(config=model.config.get_text_config()), new)


@cache
def hot(name: str) -> PreTrainedModel:
    """The model of architecture ``name`` in bfloat16, its attention scaled so that logits reach 200 in each layer."""
    model = copy.deepcopy(zoo.model(name))
    probe = keepkv.Cache(model, "full")
    largest: dict[Any, float] = {}

    def watch(layer: Any, attend: Any) -> None:
        def watched(module: Any, query: Tensor, *args: Any, scaling: float, **kwargs: Any) -> Tensor:
            keys = kwargs["dense"][0] if "dense" in kwargs else next(next(iter(layer.store.parts())).rectangles()).keys
            keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
            largest[module] = max(largest.get(module, 0.0), float((query @ keys.mT).abs().max()) * scaling)
            return attend(module, query, *args, scaling=scaling, **kwargs)

        layer.attend = watched

    for layer in probe.compressible:
        watch(layer, layer.attend)
    with torch.no_grad():
        model(**batch(), **{CACHE: probe})
    for module, logit in largest.items():
        module.scaling *= 200.0 / logit
    return model.to(torch.bfloat16)
