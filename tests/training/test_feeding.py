"""Text through a compressing cache: the same evictions a token at a time and in blocks, and batches of texts."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from matrix import cache, compresses
from replayed import cache_of, dropping
from transformers import AutoTokenizer

import keepkv
from keepkv import training
from keepkv.embedded import embedded_model
from keepkv.errors import KeepKVError, UnknownName
from keepkv.training.feed import evaluating
from keepkv.training.texts import Text, batch, from_file, from_task

feeding = import_module("keepkv.training.feed")  # the package has a function of that name
LENGTHS = ((40, 25), (20, 31), (5, 9))  # read, decoded


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded_model())


def texts() -> list[Text]:
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(3, zoo.VOCAB, (n,), generator=generator).tolist()

    return [Text(ids(a), ids(b), (True,) * b, f"text {a}") for a, b in LENGTHS]


def leaving(record: training.Record, one: list[Text]) -> list[torch.Tensor]:
    """Of each row what those of its queries see that foretell something: later evictions count as none."""
    return [x[:, : text.tokens].clamp(max=text.tokens - 1) for x, text in zip(record.evict_at, one, strict=True)]


@pytest.mark.parametrize("method", [one for one in dropping() if compresses(one.values[0])][::6])
def test_blocks_evict_what_single_tokens_do(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also padded: what is read in front, replies behind. keepkv3 has a near tie of one token in a head here."""
    model, given = zoo.model("llama"), batch(texts())
    found = []
    for single in (False, True):
        if single:
            monkeypatch.setattr(feeding, "_block", lambda *given: 1)
        made = cache("llama", method, 14, when=keepkv.When(every=6))
        found.append(leaving(feeding.feed(model, made, given.input_ids, given.attention_mask, given.read), texts()))
    for a, b in zip(*found, strict=True):
        assert int((a != b).sum()) <= (2 if method[0] == "keepkv3" else 0)
        assert int((a < a.shape[1] - 1).sum()) > 0 or a.shape[1] < 15


def test_a_batch_evicts_what_each_text_does_alone() -> None:
    model, every = zoo.model("llama"), texts()
    given, when = batch(every), keepkv.When(every=4)
    together = training.feed(model, cache_of(model, when=when), given.input_ids, given.attention_mask, given.read)
    for row, one in enumerate(every):
        mine = batch([one])
        alone = training.feed(model, cache_of(model, when=when), mine.input_ids, mine.attention_mask, mine.read)
        assert torch.equal(leaving(alone, [one])[0], leaving(together, every)[row])


def test_a_cache_that_compresses_once_is_fed_no_more_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, fed = zoo.model("llama"), batch(texts()), []
    forward = feeding._forward
    monkeypatch.setattr(feeding, "_forward", lambda *x: (fed.append(x[-2:]), forward(*x)))
    record = training.feed(
        model, cache_of(model, when=keepkv.When("deferred")), given.input_ids, given.attention_mask, 40
    )
    assert fed == [(0, 40), (40, 41)] and record.evict_at.shape[-1] == given.input_ids.shape[1] and record.evicted


def test_the_model_is_as_it_was() -> None:
    model = zoo.ZOO["llama"]().train()
    model.model.layers[1].eval()
    with evaluating(model):
        assert not any(one.training for one in model.modules())
    assert model.training and not model.model.layers[1].training and model.model.layers[0].mlp.training


def test_columns_of_a_batch() -> None:
    given = batch([Text([5, 6, 7], [8, 9], (False, True), "a"), Text([5], [6, 7, 8], (True,) * 3, "b")], padding=4)
    assert given.input_ids.tolist() == [[5, 6, 7, 8, 9, 4], [4, 4, 5, 6, 7, 8]]
    assert given.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert given.graded.tolist() == [[False, True, False], [True] * 3] and given.read == 3


def test_lines_of_a_file(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    lines = [{"prompt": "A", "reply": " b"}, {"context": "A", "prompt": "\nB", "reply": " c"}]
    path.write_text("\n".join(json.dumps(one) for one in lines) + "\n\n", encoding="utf-8")
    first, second = from_file(tokenizer, path)
    end = tokenizer.eos_token_id
    assert tokenizer.decode(first.read, skip_special_tokens=True) == "A" and first.rest[-1] == end
    assert all(first.graded) and second.name == "texts.jsonl, line 2"
    asked = tokenizer.encode("\nB", add_special_tokens=False)
    assert second.rest[: len(asked)] == asked and second.graded == (False,) * len(asked) + (True,) * (
        len(second.rest) - len(asked)
    )


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        ('{"promt": "A", "reply": "b"}', UnknownName, "Did you mean 'prompt'"),
        ('{"prompt": "A"}', KeepKVError, "line 1: a text is"),
        ('{"prompt": "A", "reply": 3}', KeepKVError, "line 1: a text is"),
        ("[1]", KeepKVError, "line 1"),
        ("", KeepKVError, "no texts"),
    ],
)
def test_lines_that_are_no_texts(line: str, error: type[Exception], said: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(error, match=said):
        from_file(tokenizer, path)


def test_tasks_as_texts(tokenizer: Any) -> None:
    (copied,) = from_task(tokenizer, "long-decode", 40, 1, 3, {"kind": "copy"})
    assert copied.graded == (False,) + (True,) * (len(copied.rest) - 1)  # the question is read, but for a token
    assert tokenizer.decode(copied.read).rstrip().endswith("these")
    apart = from_task(tokenizer, "niah-multikey-1", 100, 1, 0, {})
    (together,) = from_task(tokenizer, "niah-multikey-1", 100, 1, 0, {}, together=True)
    assert len(apart) == 4 and together.rest == [token for one in apart for token in one.rest]
    with pytest.raises(KeepKVError, match="are for evaluation"):
        from_task(tokenizer, "long-decode", 40, 2, 999_999, {})
