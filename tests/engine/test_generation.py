"""Generation modes on a compressed cache: state follows the row, and every mode of ``generate`` runs."""

from __future__ import annotations

import copy
from threading import Thread
from typing import Any

import pytest
import torch
import zoo
from running import batch, generate, row
from transformers import DynamicCache, TextIteratorStreamer

import keepkv
from keepkv.engine.versions import CACHE

ARCHS = ["llama", "gemma3", "gpt-neox"]
BUDGET = 14
METHOD: dict[str, Any] = {"method": "keepkv", "window": 4, "sinks": 2}


def cache(arch: str, budget: Any = BUDGET, **options: Any) -> keepkv.Cache:
    return keepkv.Cache(zoo.model(arch), budget=budget, **{**METHOD, **options})


def run(arch: str, inputs: dict[str, torch.Tensor], past: Any, **options: Any) -> Any:
    return zoo.model(arch).generate(**inputs, **{CACHE: past}, max_new_tokens=8, pad_token_id=0, **options)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_without_compression_equal_the_plain_cache(arch: str, mode: dict[str, Any]) -> None:
    inputs = batch()
    plain = run(arch, inputs, DynamicCache(config=zoo.model(arch).config.get_text_config()), do_sample=False, **mode)
    assert torch.equal(run(arch, inputs, cache(arch, 1.0), do_sample=False, **mode), plain)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("store", ["dense", "flat"])
def test_beam_scores_are_those_of_the_winning_sequence(arch: str, every: int | None, store: str) -> None:
    """Teacher forcing of the winner through a fresh compressed cache gives its log-probability: the slots of each
    beam followed it through every reordering."""
    inputs, when = row(batch(), 0), keepkv.When(every=every)
    out = run(
        arch, inputs, cache(arch, when=when, store=store), num_beams=4, do_sample=False, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    prompt = inputs["input_ids"].shape[1]
    new, past = out.sequences[0, prompt:], cache(arch, when=when, store=store)
    feed, total = inputs["input_ids"], 0.0
    with torch.no_grad():
        for token in new:
            logits = zoo.model(arch)(input_ids=feed, **{CACHE: past}).logits[0, -1]
            total += float(logits.log_softmax(-1)[token])
            feed = token.view(1, 1)
    assert total == pytest.approx(float(out.sequences_scores[0]), abs=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_sampling_many_sequences(arch: str) -> None:
    """``num_return_sequences`` draws the same as the plain cache at full budget, and runs compressed."""
    inputs, options = row(batch(), 0), {"do_sample": True, "num_return_sequences": 3}
    outs = []
    for past in (DynamicCache(config=zoo.model(arch).config.get_text_config()), cache(arch, 1.0)):
        torch.manual_seed(5)
        outs.append(run(arch, inputs, past, **options))
    assert torch.equal(*outs)
    small = cache(arch)
    assert run(arch, inputs, small, **options).shape[0] == 3 and small.report().compressed


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("store", ["dense", "flat", "static", "int8"])
def test_copies_and_batch_operations(arch: str, store: str) -> None:
    """One compressed context, many questions: a copy and a repeated row answer as the original does."""
    if store == "static" and arch == "gemma3":
        pytest.skip("transformers' static sliding layers cannot be repeated along the batch")
    model, context = zoo.model(arch), row(batch(), 0)["input_ids"]
    options = {"store_options": {"capacity": 40}} if store == "static" else {}
    base = cache(arch, store=store, **options)
    with torch.no_grad():
        model(input_ids=context, **{CACHE: base})
    base.compressing = False
    questions = torch.randint(3, zoo.VOCAB, (3, 5))
    singles, size = [], base.report().bytes
    for question in questions:
        with torch.no_grad():
            singles.append(model(input_ids=question[None], **{CACHE: base.copy()}).logits)
    assert base.report().bytes == size  # the copies left the original alone
    repeated = base.copy()
    repeated.batch_repeat_interleave(3)
    with torch.no_grad():
        together = model(input_ids=questions, **{CACHE: repeated}).logits
    # Packing quantises per slot whatever the batch, so even int8 agrees to rounding.
    assert torch.allclose(together, torch.cat(singles), atol=1e-5)
    repeated = base.copy()
    repeated.batch_repeat_interleave(3)
    repeated.batch_select_indices(torch.tensor([2, 0]))
    with torch.no_grad():
        chosen = model(input_ids=questions[[2, 0]], **{CACHE: repeated}).logits
    assert torch.allclose(chosen, torch.cat([singles[2], singles[0]]), atol=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
def test_reset_starts_afresh(arch: str) -> None:
    model, past = zoo.model(arch), cache(arch)
    first = generate(model, row(batch(), 0), past)
    past.reset()
    again = generate(model, row(batch(), 0), past)
    assert torch.equal(first.scores_, again.scores_)
    past.reset()
    windows = sum(layer.is_sliding for layer in past.layers if hasattr(layer, "is_sliding"))
    assert past.report().bytes in (0, 8 * windows) and past.get_seq_length() == 0  # the number of each window
    assert past.report().bytes == cache(arch).report().bytes


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("every", [None, 3])
def test_assisted_decoding(arch: str, every: int | None) -> None:
    """Prompt lookup and an assistant model: greedy tokens at full budget; compressed, the prompt is compressed once
    the candidates are settled and rollback never reaches into compressed tokens."""
    inputs = row(batch(), 0)
    greedy = run(arch, inputs, cache(arch, 1.0), do_sample=False)
    lookup = {"prompt_lookup_num_tokens": 3, "do_sample": False}
    assert torch.equal(run(arch, inputs, cache(arch, 1.0), **lookup), greedy)
    assert torch.equal(run(arch, inputs, cache(arch, 1.0), assistant_model=zoo.model(arch), do_sample=False), greedy)
    small = cache(arch, when=keepkv.When(every=every))
    assert run(arch, inputs, small, **lookup).shape == greedy.shape
    assert small.report().compressed
    small = cache(arch, when=keepkv.When(every=every))
    run(arch, inputs, small, assistant_model=zoo.model(arch), do_sample=False)
    assert small.report().compressed


@pytest.mark.parametrize("store", ["dense", "flat"])
def test_rollback_on_a_compressed_past_leaves_no_trace(store: str) -> None:
    model, past = zoo.model("llama"), cache("llama", store=store)
    generate(model, row(batch(), 0), past)
    probe = torch.tensor([[7]])
    with torch.no_grad():
        expected = model(input_ids=probe, **{CACHE: past.copy()}).logits
        model(input_ids=torch.tensor([[4, 5, 6]]), **{CACHE: past.copy()})
        past.activate_past_recording()
        model(input_ids=torch.tensor([[4, 5, 6]]), **{CACHE: past})
        past.crop(-3)
        assert torch.equal(model(input_ids=probe, **{CACHE: past}).logits, expected)
    with pytest.raises(keepkv.KeepKVError, match="since the last compression"):
        past.crop(-40)


@pytest.mark.parametrize("arch", ARCHS)
def test_streaming(arch: str, tmp_path: Any) -> None:
    tokenizer = _tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    inputs, past = row(batch(), 0), cache(arch)
    options = {**inputs, CACHE: past, "max_new_tokens": 8, "streamer": streamer, "do_sample": False}
    thread = Thread(target=zoo.model(arch).generate, kwargs={**options, "pad_token_id": 0})
    thread.start()
    pieces = list(streamer)
    thread.join()
    expected = run(arch, inputs, cache(arch), do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "".join(pieces).split() == tokenizer.decode(expected).split()


@pytest.mark.parametrize("arch", ARCHS)
def test_inputs_embeds(arch: str) -> None:
    inputs, model = row(batch(), 0), zoo.model(arch)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    past = cache(arch)
    out = model.generate(inputs_embeds=embeds, **{CACHE: past}, max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = run(arch, inputs, cache(arch), do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(out, expected) and past.report().compressed


@pytest.mark.parametrize("arch", ARCHS)
def test_pipeline_inside_the_context_manager(arch: str) -> None:
    """A pipeline with batches gives what ``generate`` gives, each call with a fresh cache, and leaves nothing."""
    from transformers import pipeline

    model, tokenizer = zoo.model(arch), _tokenizer()
    before = model.config.get_text_config()._attn_implementation
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = [" ".join(f"t{i}" for i in x["input_ids"][0].tolist()) for x in (row(batch(), 0), row(batch(), 1))]
    with keepkv.compressed(model, METHOD["method"], BUDGET, window=4, sinks=2) as caches:
        outs = pipe(prompts, batch_size=2, max_new_tokens=8, do_sample=False, return_full_text=False)
    assert len(caches) == 1 and caches[0].report().compressed
    assert model.config.get_text_config()._attn_implementation == before
    assert "_prepare_cache_for_generation" not in vars(model)
    for prompt, out in zip(prompts, outs, strict=True):
        expected = run(arch, dict(tokenizer(prompt, return_tensors="pt")), cache(arch), do_sample=False)
        length = len(prompt.split())
        assert (
            out[0]["generated_text"].split() == tokenizer.decode(expected[0, length:], skip_special_tokens=True).split()
        )


def test_custom_generate_and_bare_forwards() -> None:
    """``custom_generate`` gets the cache; a bare forward continues from the tokens seen without position_ids."""
    inputs = row(batch(), 0)

    def greedy(
        model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kw: Any
    ) -> Any:
        past, feed = kw[CACHE], input_ids
        for _ in range(8):
            with torch.no_grad():
                feed = model(input_ids=feed, **{CACHE: past}).logits[:, -1:].argmax(-1)
            input_ids = torch.cat((input_ids, feed), dim=1)
        return input_ids

    expected = run("llama", inputs, cache("llama"), do_sample=False)
    past = cache("llama")
    assert torch.equal(run("llama", inputs, past, custom_generate=greedy), expected)
    assert past.get_seq_length() == expected.shape[1] - 1


def test_a_model_in_float64() -> None:
    """Rows of a padded batch decode as alone, to rounding, where the least number of the dtype is no float32: without
    the conversion first, RuntimeError "value cannot be converted to type float without overflow"."""
    model = copy.deepcopy(zoo.model("llama")).double()
    options = {**METHOD, "budget": BUDGET, "method": "snapkv"}
    together = generate(model, batch(), keepkv.Cache(model, **options)).scores_
    for i in range(together.shape[0]):
        alone = generate(model, row(batch(), i), keepkv.Cache(model, **options)).scores_
        assert torch.allclose(alone[0], together[i], atol=1e-6)


def _tokenizer() -> Any:
    """A word-level tokenizer with words t3 … t127, so that any ids survive a round trip through text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<bos>": 1, "<unk>": 2} | {f"t{i}": i for i in range(3, zoo.VOCAB)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", padding_side="left")
