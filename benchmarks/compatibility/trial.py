"""One architecture is tried: what becomes of its layers under compression, and whether the result is right."""

from __future__ import annotations

import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import keepkv
from keepkv.engine.examine import kind_of
from keepkv.engine.shrink import PLAIN_TOKENS
from keepkv.engine.versions import CACHE
from keepkv.errors import CacheFileError, CacheStateError, UnsupportedModel

LENGTHS = (61, 33, 3)
BUDGET = 14
NEW = 5
CLOSE = 2e-4
OPTIONS: dict[str, Any] = {"window": 4, "sinks": 2}


@dataclass(frozen=True)
class Outcome:
    """What was found: either a reason to refuse, or layers and notes.

    compressed, left: how many layers keepkv takes over, and the kinds of those that stay as transformers keeps them.
    refused: the reason given when the cache is made. plain: what is wrong with the model under transformers' own cache;
    the checks that this spoils are left out. faults: what is wrong under keepkv's: none, or keepkv has to be mended.
    """

    compressed: int = 0
    left: tuple[str, ...] = ()
    refused: str | None = None
    plain: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


def batch() -> dict[str, Tensor]:
    """Random prompts of ``LENGTHS``, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, PLAIN_TOKENS, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.stack([torch.arange(max(LENGTHS)) >= max(LENGTHS) - n for n in LENGTHS]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def row(i: int) -> dict[str, Tensor]:
    """Row ``i`` of the batch, without its padding."""
    inputs = batch()
    real = inputs["attention_mask"][i].bool()
    return {name: x[i : i + 1, real] for name, x in inputs.items()}


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], cache: Any) -> tuple[Tensor, Tensor]:
    """Tokens (B, T + NEW), greedy, and the logits (B, NEW, vocabulary) that they were chosen by."""
    out = model.generate(
        **inputs, **{CACHE: cache}, use_cache=True, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, dim=1).float()


def plain_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def off(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the size of what is compared."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1.0))


def attempt(model: PreTrainedModel) -> Outcome:
    """Try ``model``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = _cache(model)
        except UnsupportedModel as error:
            return Outcome(refused=_reason(error))
        ours = {layer.info.index for layer in made.compressible}
        left = tuple(kind_of(layer) for i, layer in enumerate(made.layers) if i not in ours)
        plain, expected = _plain(model)
        if expected is None:
            return Outcome(len(ours), left, None, plain)
        try:
            generate(model, row(0), _cache(model))
        except UnsupportedModel as error:
            return Outcome(refused=f"at the first forward: {_reason(error)}")
        except Exception as error:  # whatever it is, it is ours: the plain cache does
            return Outcome(len(ours), left, None, plain, (f"{type(error).__name__}: {error}",))
        return Outcome(len(ours), left, None, plain, tuple(_faults(model, expected, plain)))


def _reason(error: UnsupportedModel) -> str:
    """Why a model was refused, without its name, the remedy and what differs between models of one kind."""
    text = re.split(r"[.;] |, so (?:it|their|that)|: a 4-D", str(error))[0]
    text = re.sub(r"^\w*[A-Z]\w*:? ", "", text)
    return re.sub(r" \([^)]*\)| \[[\d, ]+\]| of its \w+Config", "", text)


def _plain(model: PreTrainedModel) -> tuple[tuple[str, ...], tuple[Tensor, Tensor] | None]:
    """What is wrong with ``model`` under transformers' own cache, and what it generates; None where it does not."""
    try:
        first, again = (generate(model, batch(), plain_cache(model)) for _ in range(2))
    except Exception as error:  # whatever a model's own code raises
        return (f"does not generate from text alone ({type(error).__name__})",), None
    wrong = []
    if not torch.isfinite(first[1]).all():
        return ("gives NaN",), None
    if off(*(x[1] for x in (first, again))) > 0:
        wrong.append("is not repeatable")
    alone = [generate(model, row(i), plain_cache(model))[1][0] for i in range(len(LENGTHS))]
    if max(off(x[:1], y[:1]) for x, y in zip(alone, first[1], strict=True)) > CLOSE:
        wrong.append("gives padded rows other logits than the same rows alone")
    return tuple(wrong), first


def _faults(model: PreTrainedModel, expected: tuple[Tensor, Tensor], plain: tuple[str, ...]) -> list[str]:
    """What is wrong under keepkv's cache; checks that the plain model fails are left out."""
    checks = {
        "at full budget": lambda: _full_budget(model, expected),
        "a second turn": lambda: _second_turn(model),
        "bytes": lambda: _within_budget(model),
        "save and load": lambda: _saved(model),
    }
    if not any("padded" in text for text in plain):
        checks["rows of a batch"] = lambda: _rows(model)
    found = []
    for name, run in checks.items():
        try:
            wrong = run()
        except Exception as error:  # ours, whatever it is: the plain cache does
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            found.append(f"{name}: {wrong}")
    return found


def _cache(model: PreTrainedModel, **options: Any) -> keepkv.Cache:
    return keepkv.Cache(model, "snapkv", BUDGET, **OPTIONS, **options)


def _full_budget(model: PreTrainedModel, expected: tuple[Tensor, Tensor]) -> str:
    tokens, logits = generate(model, batch(), keepkv.Cache(model, "snapkv", 1.0, **OPTIONS, when=keepkv.When(every=3)))
    if torch.equal(tokens, expected[0]) and off(logits, expected[1]) < CLOSE:
        return ""
    return f"logits off by {off(logits, expected[1]):.2g}"


def _rows(model: PreTrainedModel) -> str:
    when = keepkv.When(every=3)
    together = _cache(model, when=when)
    logits = generate(model, batch(), together)[1]
    for i in range(len(LENGTHS)):
        mine = _cache(model, when=when)
        alone = generate(model, row(i), mine)[1][0]
        kept = [together.report().kept[layer][i] == mine.report().kept[layer][0] for layer in mine.report().kept]
        if off(alone, logits[i]) > CLOSE or not all(kept):
            return f"row {i} off by {off(alone, logits[i]):.2g}"
    return ""


def _second_turn(model: PreTrainedModel) -> str:
    """Uncompressed, a second turn on one cache is what transformers' own gives; compressed, all of it is seen."""
    logits = {}
    for name, cache in (("plain", plain_cache(model)), ("full", keepkv.Cache(model, "full")), ("ours", _cache(model))):
        tokens = generate(model, row(0), cache)[0]
        ids = torch.cat((tokens, row(1)["input_ids"]), dim=1)
        logits[name] = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache)[1]
        if name == "ours" and cache.compressible and cache.report().seen != [ids.shape[1] + NEW - 1]:
            return f"saw {cache.report().seen} of {ids.shape[1] + NEW - 1} tokens"
    if not torch.isfinite(logits["ours"]).all():
        return "NaN"
    difference = off(logits["full"], logits["plain"])
    return f"logits off by {difference:.2g}" if difference > CLOSE else ""


def _within_budget(model: PreTrainedModel) -> str:
    """The compressible layers hold no more slots than asked, and weigh what as many slots of a plain cache do."""
    cache = _cache(model)
    with torch.no_grad():
        model(**row(0), use_cache=True, **{CACHE: cache})
    cache.compress()
    held = allowed = 0
    for layer in cache.compressible:
        names = ("keys", "values")
        held += sum(x.untyped_storage().nbytes() for n, x in layer.store.tensors().items() if n.endswith(names))
        allowed += BUDGET * layer.store.slot_bytes().plain
    if cache.compressible and not cache.report().compressed:
        return "nothing was compressed"
    return f"{held} bytes of {allowed}" if held > 1.03 * allowed else ""


def _saved(model: PreTrainedModel) -> str:
    cache, inputs = _cache(model), row(0)
    tokens = generate(model, inputs, cache)[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        try:
            cache.save(path)
        except CacheStateError:  # a recurrent state, which no file holds
            return ""
        try:
            loaded = keepkv.Cache.load(path, model)
        except CacheFileError:
            return "what was saved is refused"
    more = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    a, b = generate(model, more, cache)[1], generate(model, more, loaded)[1]
    return f"logits off by {off(a, b):.2g}" if off(a, b) > 1e-5 else ""
