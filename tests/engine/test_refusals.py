"""Ways to go silently wrong, each found once in some library, each a clear error or the right answer here."""

from __future__ import annotations

from typing import Any

import matrix
import pytest
import torch
import zoo
from matrix import METHODS, compresses, sampled
from running import batch, generate, row
from transformers import DynamicCache

import keepkv
from keepkv.engine.versions import CACHE
from keepkv.errors import CacheStateError, UnknownName, UnsupportedInput, UnsupportedModel

SMALL: dict[str, Any] = {"window": 4, "sinks": 2}


def test_changing_the_attention_implementation_afterwards_raises() -> None:
    model = zoo.ZOO["llama"]().eval()
    cache = keepkv.Cache(model, "snapkv", 14, **SMALL)
    for other in ("sdpa", "eager"):
        model.set_attn_implementation(other)
        with pytest.raises(UnsupportedModel, match="keepkv"):
            generate(model, row(batch(), 0), cache, new=2)


def test_only_the_text_part_of_a_vision_model_is_switched() -> None:
    model = zoo.ZOO["qwen2-vl"]().eval()
    before = model.config.vision_config._attn_implementation
    held = keepkv.Cache(model, "snapkv", 14, **SMALL)
    assert held.compressible and model.config.get_text_config()._attn_implementation == "keepkv"
    assert model.config.vision_config._attn_implementation == before


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt-oss", "deepseek-v3"])
def test_left_on_keepkv_a_model_behaves_as_before(arch: str) -> None:
    """Without a keepkv cache, generation and a training step go the stock way."""
    model = zoo.ZOO[arch]().eval()
    plain = generate(model, batch(), DynamicCache(config=model.config))
    held = keepkv.Cache(model, "snapkv", 14, **SMALL)
    assert torch.allclose(generate(model, batch(), None).scores_, plain.scores_, atol=1e-5)
    loss = model.train()(**batch(), labels=batch()["input_ids"]).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert held.seen.tolist() == [] and model.config._attn_implementation == "keepkv"


def test_context_manager_restores_what_it_found() -> None:
    """Also where the model cannot go back to sdpa, and when the body raises."""
    model = zoo.ZOO["gpt-oss"]().eval()
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="body"), keepkv.compressed(model, "snapkv", 14, **SMALL):
        assert model.config._attn_implementation == "keepkv"
        raise RuntimeError("body")
    assert model.config._attn_implementation == before
    with pytest.raises(UnknownName, match="snapkv"), keepkv.compressed(model, "snapvk", 14):
        pass
    assert model.config._attn_implementation == before


def test_right_padding_raises_and_leaves_the_cache_intact() -> None:
    model, cache = zoo.model("llama"), keepkv.Cache(zoo.model("llama"), "snapkv", 14, **SMALL)
    wrong = {name: x.flip(-1) for name, x in batch().items()}
    with pytest.raises(UnsupportedInput, match="padding_side"):
        generate(model, wrong, cache)
    out = generate(model, batch(), cache)
    fresh = generate(model, batch(), keepkv.Cache(model, "snapkv", 14, **SMALL))
    assert torch.equal(out.scores_, fresh.scores_)


def test_input_that_a_compressed_cache_cannot_honour_raises() -> None:
    model, inputs = zoo.model("llama"), row(batch(), 0)
    with pytest.raises(UnsupportedInput, match="output_attentions"), torch.no_grad():
        model(**inputs, **{CACHE: keepkv.Cache(model, "snapkv", 14, **SMALL)}, output_attentions=True)
    length = inputs["input_ids"].shape[1]
    four = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with pytest.raises((UnsupportedInput, UnsupportedModel), match="mask"), torch.no_grad():
        cache = keepkv.Cache(model, "snapkv", 14, **SMALL)
        model(input_ids=inputs["input_ids"], attention_mask=four, **{CACHE: cache})
    cache = keepkv.Cache(model, "snapkv", 14, **SMALL)
    with pytest.raises(UnsupportedModel, match="position_bias"):
        cache.compressible[0].check_input({"position_bias": torch.zeros(1)})
    generate(model, inputs, cache)
    with pytest.raises(UnsupportedInput, match="batch of 3"), torch.no_grad():
        model(**batch(), **{CACHE: cache})


def test_a_forward_that_failed_midway_is_not_continued() -> None:
    model, cache = zoo.model("llama"), keepkv.Cache(zoo.model("llama"), "snapkv", 14, **SMALL)
    attend = cache.compressible[1].attend
    cache.compressible[1].attend = lambda *a, **k: (_ for _ in ()).throw(MemoryError("out of memory"))  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        generate(model, row(batch(), 0), cache)
    cache.compressible[1].attend = attend  # type: ignore[method-assign]
    with pytest.raises(CacheStateError, match="reset"):
        generate(model, row(batch(), 0), cache)
    cache.reset()
    generate(model, row(batch(), 0), cache)


def test_the_handle_has_no_tensor_behaviour() -> None:
    from keepkv.engine.handle import KVHandle

    cache = keepkv.Cache(zoo.model("llama"), "snapkv", 14, **SMALL)
    handle = KVHandle(cache.compressible[0], torch.zeros(1, 2, 3, 16), 7)
    assert handle.shape == (1, 2, 7, 16) and handle.to("cpu") is handle
    for misuse in (lambda: handle + 1, lambda: handle.transpose(1, 2), lambda: torch.cat([handle]), lambda: handle[0]):
        with pytest.raises(UnsupportedModel, match="attention implementation"):
            misuse()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("method", sampled(2, METHODS))
def test_one_token_prompts_and_one_token_chunks(method: tuple[str, dict[str, Any]]) -> None:
    """A prompt of one token works, and padding that arrives in one-token chunks is padding."""
    model = zoo.model("llama")
    options = {"when": keepkv.When(every=3)} if compresses(method) else {}
    out = generate(model, {"input_ids": torch.tensor([[5]])}, matrix.made(model, method[0], 8, **method[1], **options))
    assert torch.isfinite(out.scores_).all()
    if compresses(method):
        options = {"when": keepkv.When(prefill="deferred", every=3)}
    inputs = batch((9, 4))
    out = generate(model, inputs, matrix.made(model, method[0], 8, **method[1], **options), prefill_chunk_size=1)
    for i in range(2):
        mine = matrix.made(model, method[0], 8, **method[1], **options)
        alone = generate(model, row(inputs, i), mine, prefill_chunk_size=1)
        if not compresses(method):  # one-token chunks count as decoding: rows reach their budget at other steps
            assert torch.allclose(alone.scores_[0], out.scores_[i], atol=1e-5)
        assert torch.isfinite(out.scores_).all()


@pytest.mark.parametrize("method", sampled(2, METHODS, first=1))
def test_turns_of_unequal_length(method: tuple[str, dict[str, Any]]) -> None:
    """Padding between turns: a second turn padded on the left, in the middle of the row, equals the rows alone."""
    model, first, second = zoo.model("llama"), batch((33, 9)), batch((12, 5), seed=2)
    cache = matrix.made(model, method[0], 14, **method[1])

    def talk(past: Any, turns: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        mask = turns[0]["attention_mask"]
        with torch.no_grad():
            for i, turn in enumerate(turns):
                mask = turn["attention_mask"] if i == 0 else torch.cat((mask, turn["attention_mask"]), dim=1)
                positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -turn["input_ids"].shape[1] :]
                out = model(
                    input_ids=turn["input_ids"], attention_mask=mask, position_ids=positions, **{CACHE: past}
                ).logits[:, -1]
        return out

    step = {"input_ids": torch.tensor([[7], [7]]), "attention_mask": torch.ones(2, 1, dtype=torch.long)}
    together = talk(cache, [first, second, step])
    for i in range(2):
        alone = talk(matrix.made(model, method[0], 14, **method[1]), [row(x, i) for x in (first, second, step)])
        assert torch.allclose(alone[0], together[i], atol=1e-5), (alone[0] - together[i]).abs().max()


@pytest.mark.parametrize(("method", "dtype"), sampled(3, METHODS, [torch.float32, torch.bfloat16, torch.float16]))
def test_extreme_logits_stay_finite_and_repeatable(method: tuple[str, dict[str, Any]], dtype: torch.dtype) -> None:
    """9. Attention logits to ±200 in any dtype: nothing overflows; two runs are identical."""
    torch.manual_seed(0)
    model = zoo.ZOO["llama"]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(75.0)
    model.to(dtype)
    options = {"when": keepkv.When(every=3)} if compresses(method) else {}
    largest: list[float] = []
    caches = [matrix.made(model, method[0], 14, **method[1], **options) for _ in range(2)]
    attend = caches[0].compressible[0].attend

    def watch(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        keys = caches[0].compressible[0].store.view().keys.repeat_interleave(2, dim=1)
        largest.append(float((query.float() @ keys.float().transpose(-1, -2)).abs().max()) * query.shape[-1] ** -0.5)
        return attend(module, query, *args, **kwargs)

    caches[0].compressible[0].attend = watch  # type: ignore[method-assign]
    outs = [generate(model, batch(), c).scores_ for c in caches]
    assert max(largest) > 150, max(largest)
    assert torch.isfinite(outs[0]).all() and torch.equal(*outs)
    for layer in caches[0].compressible:
        slots = layer.store.view()
        assert all(torch.isfinite(x[slots.valid]).all() for x in (slots.keys, slots.values, slots.log_votes))


@pytest.mark.parametrize("store", ["dense", "flat"])
def test_votes_equal_duplicated_slots(store: str) -> None:
    """6. A slot with p votes gives the logits of p physical copies, through a whole model."""
    from keepkv.core.slots import Slots

    model, ids = zoo.model("llama"), row(batch(), 0)["input_ids"]
    counts = torch.randint(1, 5, (1, 1, ids.shape[1])).expand(1, 2, -1)
    caches = [keepkv.Cache(model, "full", store=store) for _ in range(3)]
    for cache in caches:
        with torch.no_grad():
            model(input_ids=ids, **{CACHE: cache})
    for voted, copied in zip(caches[0].compressible, caches[1].compressible, strict=True):
        slots = voted.store.view()
        voted.store.load(slots.with_(log_votes=counts.float().log()))
        copy = torch.arange(ids.shape[1]).repeat_interleave(counts[0, 0])
        copied.store.load(Slots(*(x[:, :, copy] for x in (slots.keys, slots.values, slots.log_votes, slots.positions))))
        voted.progress.compressed = copied.progress.compressed = True
    feed = torch.randint(3, zoo.VOCAB, (1, 4))
    with torch.no_grad():
        logits = [model(input_ids=feed, **{CACHE: cache}).logits for cache in caches]
    assert torch.allclose(logits[0], logits[1], atol=2e-5)
    assert (logits[0] - logits[2]).abs().max() > 1e-2  # votes matter


def test_names_and_options_are_checked() -> None:
    model = zoo.model("llama")
    with pytest.raises(UnknownName, match="Did you mean 'snapkv'"):
        keepkv.Cache(model, "snapkb", 0.5)
    with pytest.raises(UnknownName, match="store"):
        keepkv.Cache(model, "snapkv", 0.5, store="densee")
    with pytest.raises(keepkv.KeepKVError, match=r"windw.*Its options: .*window"):
        keepkv.Cache(model, "snapkv", 0.5, windw=3)
    with pytest.raises(keepkv.KeepKVError, match="immediate"):
        keepkv.When(prefill="later")
    with pytest.raises(keepkv.KeepKVError, match="every=0 is not a whole number from 1"):
        keepkv.When(every=0)


def test_the_full_cache_gives_nothing_up() -> None:
    """Whatever its budget, compressed by hand or not; before, a compression by hand dropped slots at random."""
    model = zoo.model("llama")
    with pytest.warns(UserWarning, match="'full' keeps every token: the budget of 30% of the tokens is not applied"):
        cache = keepkv.Cache(model, "full", 0.3)
    generate(model, batch(), cache)
    cache.compress()
    assert cache.report().held == 1.0 and not cache.report().compressed


def test_the_receipt_counts_stay_with_their_rows() -> None:
    """Beam reordering moves counters with rows; a copy's counters are its own."""
    model, cache = zoo.model("llama"), keepkv.Cache(zoo.model("llama"), "random", 14, sinks=0)
    generate(model, batch(), cache)
    dropped = cache.compressible[0].tally.dropped
    assert dropped is not None
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    assert torch.equal(cache.compressible[0].tally.dropped, dropped.flip(0))
    twin = cache.copy()
    twin.reset()
    assert cache.report().dropped > 0 and twin.report().dropped == 0


def test_a_mask_in_four_dimensions_is_refused_with_the_remedy() -> None:
    model = zoo.model("llama")
    with pytest.raises(UnsupportedModel, match="Pass a 2-D attention mask"):
        model(
            torch.ones(1, 8, dtype=torch.long),
            attention_mask=torch.ones(1, 1, 8, 8).tril().bool(),
            **{CACHE: keepkv.Cache(model, "knorm", 16)},
        )


def test_rows_in_fixed_buffers_of_a_window_are_not_moved() -> None:
    """Without the guard: AttributeError of transformers, after other layers were moved."""
    cache = keepkv.Cache(zoo.model("gemma3"), "snapkv", 14, store="static", store_options={"capacity": 64}, **SMALL)
    with torch.no_grad():
        zoo.model("gemma3")(**row(batch(), 0), **{CACHE: cache})
    for move in (lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices(torch.tensor([0])),
                 lambda: cache.split([0])):  # fmt: skip
        with pytest.raises(UnsupportedModel, match="Use store='dense'"):
            move()
