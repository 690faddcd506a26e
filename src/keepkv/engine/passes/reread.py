"""Reading the text a second time, for scores that look at how the model repeats it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.engine.cache import Cache
from keepkv.engine.passes.gradients import sensitivities
from keepkv.engine.places import text_of, text_places
from keepkv.engine.versions import CACHE
from keepkv.errors import CacheStateError, KeepKVError, UnsupportedInput
from keepkv.score.base import WORTH, Score

LEAD = 8  # tokens before a chunk that are read with it, so that the model finds the place (KVzip's code)

Stats = list[dict[str, Tensor]]  # of each layer, (B,H,S) each


@torch.no_grad()
def reread(
    model: PreTrainedModel,
    cache: Cache,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    prompt_ids: Tensor | None = None,
    chunk: int = 2048,
) -> None:
    """Let the score of ``cache`` observe how ``model`` repeats what it has read: what ``"kvzip"`` scores by.

    cache: has read ``input_ids`` and was not compressed since, so its method has ``when=keepkv.When("deferred")``.
        Nothing of it changes but the score's statistics, which start anew.
    input_ids (B,T), attention_mask (B,T): all that was fed, as it was fed; padding on the left. Of pictures the
        placeholders are left out: text alone is repeated.
    prompt_ids (P,) or (B,P): a request to repeat the text, read before each chunk.
    chunk: tokens repeated at a time, each time on a new copy of the cache that knows nothing of earlier repeats; behind
        the first ``LEAD`` more that precede the chunk, as in the paper. Rows are cut each from its own first token.

        cache = keepkv.Cache(model, "kvzip", budget=0.3, when=keepkv.When("deferred"))
        model(input_ids=context, cache=cache)
        keepkv.reread(model, cache, context, prompt_ids=repeat)
        cache.compress()

    Takes about as long as reading the text once, on a cache of that length, and the memory of a copy of the cache. A
    score that asks for gradients, "kvgrad", takes about four times as long, and the activations of a chunk in every
    layer: give smaller chunks, such as 512.
    The paper's code takes the softmax of a chunk's queries over the chunk's slots, the first tokens and the repeat
    alone; here they see the whole context, as in the paper's definition, and every slot they attend to counts.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if chunk < 2:
        raise KeepKVError(f"reread(chunk={chunk}): at least 2 tokens, 2048 or so for speed")
    if not cache.settings.method.score.needs_second_reading:
        raise KeepKVError(
            f"method {cache.settings.method.name!r} reads a text once; keepkv.reread is for those that read it twice, "
            "such as 'kvzip'"
        )
    check_whole(cache, input_ids, mask, "reread")
    rows = text_of(cache, input_ids, mask)
    prompt = input_ids.new_empty(0) if prompt_ids is None else prompt_ids.to(input_ids.device)
    prompts = prompt.expand(len(rows), prompt.shape[-1])
    stats = [_fresh(layer.store.view().stats, cache.settings.stats) for layer in cache.compressible]
    for start in range(0, max(map(len, rows)), chunk):
        # Rows whose part is of one length are read together. Padding behind a text would take up the window of sliding
        # layers, which transformers counts in columns.
        together: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            if start < len(row):
                together.setdefault(min(len(row), start + chunk), []).append(i)
        for end, members in together.items():
            parts = [torch.cat((prompts[i], rows[i][max(0, start - LEAD) : end])) for i in members]
            _observe(model, cache, torch.tensor(members, device=mask.device), torch.stack(parts), mask, stats)
    for layer, found in zip(cache.compressible, stats, strict=True):
        layer.store.write_stats(found)


def check_whole(cache: Cache, input_ids: Tensor, mask: Tensor, name: str) -> None:
    """Raise unless ``cache`` holds all of ``input_ids`` and nothing else; ``name``: of the function that asks. What
    ``cache`` holds can be written to afterwards."""
    cache.renew()
    seen = cache.shared.positions.seen
    for layer in cache.compressible:
        layer.listen()
    if seen is None:
        raise CacheStateError(f"the cache has not read anything yet: feed the prompt first, then call keepkv.{name}")
    if any(layer.progress.compressed for layer in cache.compressible):
        raise CacheStateError(
            f"the cache was compressed before keepkv.{name} was called. Make it with when=keepkv.When('deferred'), "
            f"feed the whole prompt, call keepkv.{name}, and then cache.compress()."
        )
    if (
        input_ids.shape != mask.shape
        or mask.shape[1] != cache.get_seq_length()
        or not seen.equal(mask.sum(-1).to(seen))
    ):
        raise UnsupportedInput(
            f"input_ids {tuple(input_ids.shape)} and a mask {tuple(mask.shape)} with {mask.sum(-1).tolist()} tokens "
            f"are not what the cache has read: {cache.get_seq_length()} columns, tokens {seen.tolist()}. Give all of "
            "it, with the attention mask it was read with."
        )


def _fresh(stats: dict[str, Tensor], starts: dict[str, float]) -> dict[str, Tensor]:
    return {name: torch.full_like(x, starts[name]) for name, x in stats.items()}


def _observe(model: PreTrainedModel, cache: Cache, rows: Tensor, ids: Tensor, mask: Tensor, stats: Stats) -> None:
    """Read ``ids`` (R,T) behind a copy of ``rows`` (R,) of ``cache``, and update their ``stats`` in place."""
    some = rows if len(rows) < len(mask) else None
    worth = []
    if cache.settings.method.score.needs_gradients:
        worth = sensitivities(model, watching(cache, some), ids, mask[rows])
    twin = watching(cache, some)
    for layer, x in zip(twin.compressible, worth, strict=False):
        layer.score_state[WORTH] = x
    for layer, held in zip(twin.compressible, stats, strict=True):
        layer.store.write_stats({name: x[rows] for name, x in held.items()})
    feed(model, twin, ids, mask[rows])
    for layer, held in zip(twin.compressible, stats, strict=True):
        found = layer.store.view().stats
        for name, x in held.items():
            x[rows] = found[name][:, :, : mask.shape[1]]


def watching(cache: Cache, rows: Tensor | None = None, score: Score | None = None) -> Cache:
    """A copy of ``cache``, or of its ``rows`` (R,), that never compresses and whose ``score`` observes all."""
    method = cache.settings.method
    twin = cache.copy(method=method if score is None else replace(method, score=score), observing=True)
    if rows is not None:
        twin.batch_select_indices(rows)
    return twin


def feed(model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor) -> Tensor:
    """Read ``ids`` (B,T) behind what ``cache`` holds, which was read with ``mask`` (B, columns): logits (B,V) of what
    comes next."""
    seen = torch.cat((mask, mask.new_ones(ids.shape)), dim=1)
    out = model(
        input_ids=ids, attention_mask=seen, position_ids=text_places(cache, seen, ids.shape[1]),
        **{CACHE: cache}, use_cache=True, logits_to_keep=1,
    )  # fmt: skip
    logits: Tensor = out.logits[:, -1]
    return logits
