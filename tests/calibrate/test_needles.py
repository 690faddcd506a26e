"""Needles in texts made of token ids: found where they are said to be, whatever the tokenizer."""

from __future__ import annotations

import string
from collections import Counter
from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import keepkv
from keepkv.calibrate import with_needles
from keepkv.calibrate.needles import KNOWLEDGE, SORTS
from keepkv.errors import CalibrationError
from keepkv.tasks.text import document

CHAT = "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}<|begin|>assistant\n"


@cache
def tokenizer(name: str) -> Any:
    """Bytes behind a start token as Llama 3 has them, pieces with a mark for a space as Llama 2 has them, or the same
    bytes inside a chat template without a start token."""
    if name == "embedded":
        return AutoTokenizer.from_pretrained(keepkv.embedded_model())
    special = ["<s>", "<|begin|>", "<|end|>"]
    pieces = Tokenizer(models.BPE(unk_token="<s>" if name == "pieces" else None))
    if name == "pieces":
        pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = list(string.printable) if name == "pieces" else pre_tokenizers.ByteLevel.alphabet()
    pieces.train_from_iterator(
        [document()], trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet)
    )
    if name != "chat":
        pieces.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>")
    made.add_special_tokens({"additional_special_tokens": special[1:]})
    if name == "chat":
        made.chat_template = CHAT
    return made


@pytest.mark.parametrize("name", ["embedded", "bytes", "pieces", "chat"])
def test_needles_stand_where_they_are_said_to(name: str) -> None:
    """To the token, as they are encoded; nothing special inside a text, and one start token, or the template's opening,
    before it; the lengths that were asked for."""
    words = tokenizer(name)
    pieces, needles = with_needles(words, [document()], 12_000, 400)
    special = set(words.all_special_ids)
    sizes: Counter[bool] = Counter()
    for ids, one in zip(pieces, needles, strict=True):
        row = ids[0].tolist()
        assert row[one.start : one.start + len(one.ids)] == list(one.ids)
        assert not special & set(one.ids) and ids.shape[1] <= 400
        inside = [i for i, x in enumerate(row) if x in special]
        assert inside == ([0] if words.bos_token_id == row[0] or name == "chat" else [])
        said = words.decode(one.ids)
        assert said.strip().endswith(".") and said.strip()[0].isupper()
        short = ids.shape[1] <= 200
        sizes[short] += 1
        assert (120 < ids.shape[1]) if short else (320 < ids.shape[1])
        assert words.decode(one.asked.answer).strip() and one.asked.answer == list(one.answers[0])
    assert min(sizes.values()) >= 10 and 11_600 <= sum(ids.shape[1] for ids in pieces) <= 12_000
    assert set(Counter(one.sort for one in needles)) == set(SORTS)


def test_depths_are_spread_over_texts() -> None:
    pieces, needles = with_needles(tokenizer("embedded"), [document()], 30_000, 400)
    depths = [one.start / ids.shape[1] for ids, one in zip(pieces, needles, strict=True)]
    thirds = Counter(int(3 * x) for x in depths)
    assert min(thirds.values()) >= len(depths) / 5 and min(depths) < 0.2 and max(depths) > 0.75


def test_what_is_known_is_not_said() -> None:
    """Answers of needles to be composed do not stand in them; those of the others do."""
    words = tokenizer("bytes")
    for _, one in zip(*with_needles(words, [document()], 30_000, 300), strict=True):
        said, answer = words.decode(one.ids).lower(), words.decode(one.asked.answer).strip().lower()
        assert (answer in said) == (one.sort != "knowledge"), (said, answer)
    assert all(len(pairs) >= 4 for _, _, pairs in KNOWLEDGE)


def test_the_same_seed_gives_the_same_needles() -> None:
    words = tokenizer("embedded")
    (a, one), (b, two), (c, _) = (with_needles(words, [document()], 2000, 300, seed) for seed in (1, 1, 2))
    assert one == two and [x.tolist() for x in a] == [x.tolist() for x in b] != [x.tolist() for x in c]


def test_no_more_is_read_than_was_asked_for() -> None:
    with pytest.raises(CalibrationError, match=r"5 tokens are too few .* give --tokens 300 or more"):
        with_needles(tokenizer("embedded"), [document()], 5, 300)


def test_texts_without_prose_are_refused() -> None:
    with pytest.raises(CalibrationError, match="have 0 plain sentences, 20 are needed to hide needles between"):
        with_needles(tokenizer("embedded"), ["x = 1"], 2000, 300)
