"""The embedded model loads offline and answers; its training runs from the seed alone."""

import json
import random
from pathlib import Path

import pytest
import torch

from benchmarks.embedded_model.data import encoder, row
from benchmarks.embedded_model.network import hidden_states, init_weights, make_config, rotary
from benchmarks.embedded_model.train import plan, save, train
from keepkv import tasks
from keepkv.embedded import embedded_model


@pytest.fixture(scope="module")
def loaded():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = embedded_model()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def test_it_is_a_small_llama_with_grouped_queries(loaded):
    model, tokenizer = loaded
    config = model.config
    assert config.model_type == "llama" and config.num_attention_heads > config.num_key_value_heads
    assert config.max_position_embeddings >= 4096 and config.tie_word_embeddings
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 2e6
    assert len(tokenizer) == config.vocab_size
    assert sum(file.stat().st_size for file in Path(embedded_model()).iterdir()) < 8e6


def test_tokenizer_round_trips_and_pads_left(loaded):
    _, tokenizer = loaded
    text = "Grüße, 世界! x = [1, 22, 333]\n\tThe code of amber falcon is 4821."
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.padding_side == "left"
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id
    assert len(tokenizer.encode(" amber falcon 4821", add_special_tokens=False)) == 4


def test_it_answers_held_out_questions(loaded):
    model, tokenizer = loaded
    single = tasks.get("niah-single-2")
    right = [tasks.score_item(model, tokenizer, single.generate(tokenizer, 512, 5_000_000 + i)) for i in range(20)]
    assert sum(score.correct for [score] in right) >= 16


def test_it_stops_at_the_end_of_the_line(loaded):
    model, tokenizer = loaded
    item = tasks.get("niah-single-2").generate(tokenizer, 200, 5_000_000)
    ids = tokenizer(item.context + item.questions[0].prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert len(out) <= 4


def test_published_accuracy_meets_what_the_card_says():
    rows = json.loads((Path(embedded_model()) / "accuracy.json").read_text())["rows"]
    best = {row["task"]: row for row in rows if row["length"] == 2048}
    trained = {name for name in tasks.names() if not tasks.get(name).english and name != "notes"}  # which came later
    assert set(best) == trained and all(row["questions"] >= 200 for row in rows)
    assert best["niah-single-2"]["score"] >= 0.95 and best["niah-multikey-1"]["score"] >= 0.90


def test_training_network_is_the_one_that_is_loaded(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    config = make_config(len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
    w = init_weights(config, 3)
    save(w, config, tokenizer, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(3, len(tokenizer), (2, 40), generator=torch.Generator().manual_seed(0))
    ours = hidden_states(w, config, ids, *rotary(config, 40)) @ w["model.embed_tokens.weight"].T
    torch.testing.assert_close(model(ids).logits, ours, atol=1e-5, rtol=1e-5)


def test_training_lowers_the_loss_and_repeats_bit_for_bit(tmp_path):
    small = {
        "tokens": 60 * 512, "start": None, "compiled": False, "curriculum": ((128, 1.0, 512),), "hidden_size": 32,
        "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8,
    }  # fmt: skip
    first = train(seed=1, out=tmp_path, **small)
    assert sum(first[-10:]) < 0.9 * sum(first[:10])
    assert train(seed=1, **small, stop=10) == first[:10]
    assert train(seed=2, **small, stop=1) != first[:1]
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "tokenizer.json").exists()


def test_loaders_change_no_batch_by_their_number():
    small = {
        "tokens": 40 * 512, "compiled": False, "curriculum": ((128, 0.5, 512), (256, 0.5, 512)), "hidden_size": 32,
        "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8, "seed": 1,
    }  # fmt: skip
    one = train(loaders=1, **small)
    assert sum(one[-10:]) < 0.95 * sum(one[:10])
    assert train(loaders=3, **small, stop=12) == one[:12]


@pytest.mark.parametrize("length", [64, 128, 700])
def test_rows_are_full_and_mark_their_answers(loaded, length):
    _, tokenizer = loaded
    encode = encoder(tokenizer)
    for seed in range(10):
        ids, answer = row(random.Random(seed), encode, length, tokenizer.bos_token_id)
        assert len(ids) == len(answer) == length and ids[0] == tokenizer.bos_token_id
        marked = tokenizer.decode([i for i, a in zip(ids, answer, strict=True) if a])
        assert "code" not in marked and "?" not in marked


def test_plan_spends_the_tokens_over_the_phases():
    steps = plan(100_000, ((128, 0.5, 1024), (256, 0.5, 2048)))
    assert steps[0] == (128, 8) and steps[-1] == (256, 8)
    assert sum(length * rows for length, rows in steps) == pytest.approx(100_000, rel=0.05)
